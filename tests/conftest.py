"""The pack is imported as `pack`, never by its folder's name; ComfyUI is looked for as DESIGN.md says."""

import sys
import types
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

# ComfyUI has its own top-level `nodes` and `models`, so the repository's root must not be on the path.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
sys.path[:0] = [str(TESTS), str(TESTS / "host")]
pack = types.ModuleType("pack")
pack.__path__ = [str(ROOT)]
sys.modules["pack"] = pack

from pack.training.demo.find import comfyui_version, find_comfyui  # noqa: E402

COMFYUI = find_comfyui()


def pytest_collection_modifyitems(items):
    for item in items:
        if "/host/" in item.path.as_posix():
            item.add_marker(pytest.mark.host)
            if COMFYUI is None:
                item.add_marker(pytest.mark.skip(reason="no ComfyUI found"))


def pytest_configure(config):
    config.addinivalue_line("markers", "host: needs a real ComfyUI")


def pytest_terminal_summary(terminalreporter):
    def count(outcome):
        return len({r.nodeid for r in terminalreporter.getreports(outcome) if "tests/host/" in r.nodeid})

    if COMFYUI is None:
        terminalreporter.write_line("")
        terminalreporter.write_line(
            f"NO COMFYUI FOUND: {count('skipped')} host tests were SKIPPED. Set COMFYUI_PATH to a ComfyUI to run them.",
            yellow=True,
            bold=True,
        )
    else:
        ran = count("passed") + count("failed")
        terminalreporter.write_line(
            f"Host tests run on ComfyUI {comfyui_version(COMFYUI)} ({COMFYUI}): {ran}, skipped: {count('skipped')}."
        )


@pytest.fixture(scope="session")
def comfyui():
    """The folder of the ComfyUI found."""
    return COMFYUI


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def photographs():
    """The real photographs that lie beside some checkouts."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real photographs are not beside this checkout")
    return folder
