"""The pack is imported as `pack`, never by its folder's name; ComfyUI is looked for as the demo does, COMFYUI_PATH first."""

import os
import sys
import types
from pathlib import Path

import pytest

# Before torch: threads that spin while they wait make every test many times slower on a machine that is in use.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

# ComfyUI has its own top-level `nodes` and `models`, so the repository's root must not be on the path.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
sys.path[:0] = [str(TESTS), str(TESTS / "host"), str(TESTS / "training")]
pack = types.ModuleType("pack")
pack.__path__ = [str(ROOT)]
sys.modules["pack"] = pack

from pack.training.demo.find import comfyui_version, find_comfyui  # noqa: E402

COMFYUI = find_comfyui()
BLIND = (
    (
        "no Chromium found",
        "NO CHROMIUM FOUND",
        "Install Chromium and the package playwright, or set CHROMIUM_PATH, to run them.",
    ),
    (
        "made for the page of ComfyUI",
        "THIS COMFYUI HAS ANOTHER PAGE",
        "They are made for that of ComfyUI 0.26.0, whose search box is another: set COMFYUI_PATH to it to run them.",
    ),
)
"""Why browser tests are skipped, as the skip says it; and how the last lines say it, with what to do."""


def pytest_collection_modifyitems(items):
    for item in items:
        if "/host/" in item.path.as_posix():
            item.add_marker(pytest.mark.host)
            if COMFYUI is None:
                item.add_marker(pytest.mark.skip(reason="no ComfyUI found"))


def pytest_configure(config):
    config.addinivalue_line("markers", "host: needs a real ComfyUI")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    """Say last of all how many host tests ran, or loudly that none could; before it, why the browser tests did not."""
    result = yield
    if hasattr(session.config, "workerinput"):
        return result  # the process that started this one gets its reports
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")

    def count(*outcomes):
        reports = [report for outcome in outcomes for report in reporter.getreports(outcome)]
        return len({report.nodeid for report in reports if "tests/host/" in report.nodeid})

    for why, loud, remedy in BLIND:
        blind = {report.nodeid for report in reporter.getreports("skipped") if why in str(report.longrepr)}
        if blind:
            sentence = f"{loud}: {len(blind)} browser tests were SKIPPED. {remedy}"
            reporter.write_line(sentence, yellow=True, bold=True)
    if COMFYUI is None:
        sentence = f"NO COMFYUI FOUND: {count('skipped')} host tests were SKIPPED. Set COMFYUI_PATH to run them."
        reporter.write_line(sentence, yellow=True, bold=True)
    else:
        found = f"ComfyUI {comfyui_version(COMFYUI)} ({COMFYUI})"
        reporter.write_line(f"Host tests run on {found}: {count('passed', 'failed')}, skipped: {count('skipped')}.")
    return result


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


@pytest.fixture(scope="module")
def subject_set(tmp_path_factory):
    """A data set for Subject-Diffusion, of six pictures."""
    from pack.training.pocket.subject_set import write_subjects

    folder = tmp_path_factory.mktemp("subjects")
    write_subjects(folder, 0, 6)
    return folder
