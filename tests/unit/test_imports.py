"""The import rules of the house: who may import what."""

import ast
import sys

import pytest

ALLOWED_IN_MODELS = {"torch", "numpy", "einops", "safetensors", "PIL"}
TRAINING = ("training_run.py", "scores.py")
"""Of the nodes, those that run the trainers' own code."""
HOST = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "node_helpers", "nodes", "server"}


def imports(path):
    """(level, module) of every import statement."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


def files(root, folder):
    found = sorted((root / folder).rglob("*.py"))
    assert found
    return found


def test_models_import_torch_and_siblings_only(root):
    for path in files(root, "models"):
        for level, module in imports(path):
            top = module.split(".")[0]
            if level == 0:
                assert top in sys.stdlib_module_names or top in ALLOWED_IN_MODELS, f"{path.name} imports {module}"
            else:
                assert level <= len(path.relative_to(root).parts) - 1, f"{path.name} climbs out of models/"


def test_nodes_import_ours_relatively(root):
    ours = {path.name for path in root.iterdir() if path.is_dir()} - HOST
    for path in files(root, "nodes"):
        for level, module in imports(path):
            if level == 0:
                assert module.split(".")[0] not in ours, f"{path.name} imports {module} absolutely"
            elif level == 2:
                allowed = {"models", "training"} if path.name in TRAINING else {"models"}
                assert module.split(".")[0] in allowed, f"{path.name} imports {module}: nodes take from models/ only"


@pytest.mark.parametrize("name", TRAINING)
def test_training_is_loaded_when_it_is_needed(root, name):
    """diffusers and peft would take seconds of ComfyUI's start."""
    tree = ast.parse((root / "nodes" / name).read_text())
    first = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level == 2]
    assert first
    assert all(node.module.startswith("models") for node in first)


def test_training_never_imports_the_host(root):
    for path in files(root, "training"):
        for level, module in imports(path):
            top = module.split(".")[0]
            assert level > 0 or top not in HOST, f"{path.name} imports {module}"
            assert not (level > 0 and top == "nodes"), f"{path.name} imports the nodes"


def test_training_reaches_models_through_one_file(root):
    reaching = {
        path.name
        for path in files(root, "training")
        for level, module in imports(path)
        if module.split(".")[0] == "models" and level in (0, 2, 3)
    }
    assert reaching <= {"shared.py"}


def test_the_door_holds_nothing_else(root):
    tree = ast.parse((root / "__init__.py").read_text())
    names = {target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets}
    assert names == {"WEB_DIRECTORY", "__all__"}


@pytest.mark.parametrize("folder", ["models", "nodes", "training", "tests"])
def test_files_and_functions_are_read_in_a_sitting(root, folder):
    for path in files(root, folder):
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 90, f"{node.name} in {path}"
