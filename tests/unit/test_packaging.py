"""What is said twice because two tools read it."""

import json
import re


def test_requirements_are_those_of_pyproject(root):
    text = (root / "pyproject.toml").read_text()
    listed = re.findall(r'"([^"]+)"', text.partition("dependencies = [")[2].partition("]")[0])
    assert listed == (root / "requirements.txt").read_text().split()
    assert not any(name.startswith(("torch", "numpy")) for name in listed), "a pin here replaces the user's CUDA torch"


def test_workflows_have_thumbnails_and_stand_alone(root):
    workflows = sorted((root / "workflows").glob("*.json"))
    assert len(workflows) >= 3
    for path in workflows:
        assert path.with_suffix(".jpg").stat().st_size > 5000
        workflow = json.loads(path.read_text())
        assert any(node["type"] == "MarkdownNote" for node in workflow["nodes"]), path.name
        boxes = [(*node["pos"], *node["size"]) for node in workflow["nodes"]]
        for i, (x, y, w, h) in enumerate(boxes):
            for x2, y2, w2, h2 in boxes[i + 1 :]:
                apart = x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y
                assert apart, f"nodes overlap in {path.name}"


def test_the_pocket_model_is_complete_and_small(root):
    folder = root / "models" / "pocket"
    names = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*.safetensors")}
    assert {
        "checkpoints/pocket_portraits.safetensors",
        "clip_vision/pocket_portraits_vision.safetensors",
        "ipadapter/pocket_portraits_ip_adapter.safetensors",
        "pocket_portraits_judge.safetensors",
        *(f"ipadapter/pocket_{name}.safetensors" for name in ("single", "max", "average", "self_attention")),
    } <= set(names)
    parts = ("checkpoints", "clip_vision", "ipadapter")
    assert sum(size for name, size in names.items() if name.startswith(parts)) <= 25_000_000
    assert sum(names.values()) <= 32_000_000, "with the judge, Subject-Diffusion and the examples"
    card = (folder / "README.md").read_text()
    assert all(name.rpartition("/")[2] in card for name in names)
    for page in (root / "README.md", folder / "README.md"):
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / picture).stat().st_size > 10_000, picture
