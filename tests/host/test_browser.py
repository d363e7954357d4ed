"""The real page of a real server in a headless Chromium: every template and every node, as a user meets them."""

import json
import re

import pytest
from browser import SIZE, Editor, contents, launch, wires, words
from pack.training.demo.find import ROOT, comfyui_version
from pack.training.demo.server import Server

PACK = "Personalize"
TEMPLATES = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "workflows").glob("*.json"))}
PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "nodes" / "web" / "docs").glob("*.md"))}
PICTURES = ROOT / "test-output" / "browser"
SHORTER = {"train_lora": ("PersonalizeTrainLoRA", "steps", 20)}
"""What a user would not wait for in a test, and `test_server.py` runs in full."""
LOADED = "pictures => Promise.all(pictures.map(picture => picture.decode().then(() => true, () => false)))"
GROWING = "COMFY_AUTOGROW_V3"


@pytest.fixture(scope="module")
def chromium(comfyui):
    """A browser, or a skip that the session's last lines count."""
    version = comfyui_version(comfyui)
    if [int(number) for number in re.findall(r"\d+", version)] < [0, 26]:
        pytest.skip(f"made for the page of ComfyUI 0.26.0: that of {version} has another search box")
    playwright = pytest.importorskip("playwright.sync_api", reason="no Chromium found: no playwright").sync_playwright
    with playwright() as running:
        browser = launch(running)
        if browser is None:
            pytest.skip("no Chromium found")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(chromium, comfyui, tmp_path_factory):
    with Server(comfyui, tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.fixture(scope="module")
def info(server):
    return server.get("/object_info")


@pytest.fixture(scope="module")
def opened(chromium, server):
    """An editor in use, and what it complains of by itself: a stock node, saved and opened again."""
    editor = Editor(chromium.new_page(viewport=SIZE), server.url)
    editor.start()
    editor.settle()
    editor.blank()
    editor.add("Empty Latent Image")
    editor.help()
    editor.close_help()
    editor.save("stock")
    editor.start()
    editor.open_saved("stock")
    return editor, frozenset(editor.errors)


@pytest.fixture
def editor(opened, request):
    """The editor as the test before left it, unless that one failed: then a picture of it is kept."""
    editor, _ = opened
    failed = request.session.testsfailed
    editor.errors.clear()
    yield editor
    if request.session.testsfailed > failed:
        editor.page.screenshot(path=PICTURES / f"failed_{request.node.name}.png")
        editor.start()


@pytest.fixture
def complaints(opened):
    """What the page complains of in this test, and not by itself."""
    editor, usual = opened
    return lambda: editor.errors - usual


def test_every_node_is_tested(info):
    assert set(PAGES) == {name for name in info if name.startswith(PACK)}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_opens_runs_and_is_saved(editor, complaints, name):
    template = TEMPLATES[name]
    editor.open_template(PACK, name)
    assert contents(editor.graph()) == contents(template)
    assert wires(editor.graph()) == wires(template)
    assert editor.missing() == []
    assert editor.dialogs().count() == 0
    if name in SHORTER:
        editor.set(*SHORTER[name])
    assert editor.run() == []
    editor.screenshot(PICTURES / f"template_{name}.png")
    assert editor.dialogs().count() == 0

    before = editor.graph()
    editor.save(f"my_{name}")
    editor.start()
    editor.open_saved(f"my_{name}")
    assert contents(editor.graph()) == contents(before)
    assert wires(editor.graph()) == wires(before)
    assert complaints() == set()


@pytest.mark.parametrize("name", PAGES)
def test_a_node_is_found_explained_connected_and_saved(editor, complaints, info, name):
    schema = info[name]
    editor.blank()
    node = editor.add(schema["display_name"], PACK)
    sockets = editor.sockets(node)
    inputs = {key: value for group in ("required", "optional") for key, value in schema["input"].get(group, {}).items()}
    growing = [key for key, value in inputs.items() if value[0] == GROWING]
    firsts = {f"{key}.{inputs[key][1]['template']['prefix']}0" for key in growing}
    assert set(sockets["inputs"]) == set(inputs) - set(growing) | firsts
    assert sockets["outputs"] == schema["output_name"]

    page = editor.help()
    assert page.locator("h1").inner_text() == schema["display_name"]
    assert words(page.inner_text()) == words(PAGES[name])
    assert all(page.locator("img").evaluate_all(LOADED))
    editor.screenshot(PICTURES / f"node_{name}.png")
    editor.close_help()

    types = sorted({item["type"] for template in TEMPLATES.values() for item in template["nodes"]} | set(PAGES))
    assert editor.connect(node, types) == []
    grown = set(editor.sockets(node)["inputs"]) - set(sockets["inputs"])
    assert {key.partition(".")[0] for key in grown} == set(growing), "a connected input makes room for one more"
    before = editor.graph()
    editor.save(name)
    editor.start()
    editor.open_saved(name)
    assert contents(editor.graph()) == contents(before)
    assert wires(editor.graph()) == wires(before)
    # The page of the user's language is asked for before the one that there is.
    missed = f"Failed to load resource: the server responded with a status of 404 (Not Found) /extensions/{PACK}/docs/"
    assert complaints() <= {f"{missed}{name}/en.md"}
