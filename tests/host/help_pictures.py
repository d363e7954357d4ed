"""Take the pictures of the help pages: each node in a template that has it, after a run, in the real page.

    python tests/host/help_pictures.py [NODE ...]

Writes nodes/web/docs/<node>.jpg; all nodes' by default. Chromium and Playwright are needed.
"""

import json
import sys
import tempfile
from io import BytesIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import COMFYUI, ROOT  # isort: skip
from browser import SIZE, STILL, Editor, launch
from help_pages import DOCS
from pack.training.demo.server import Server
from PIL import Image
from playwright.sync_api import sync_playwright

SHOWN, WIDTH = (760, 620), 640
"""Pixels of the page around a node, and of the picture's width."""
NOT_RUN = {"train_lora"}

FOCUS = """([type, width, height, shown]) => {
    const node = app.graph.nodes.find(node => node.type === type), ds = app.canvas.ds;
    ds.scale = Math.min(1, (shown - 30) / (node.size[1] + 60));
    ds.offset[0] = width / 2 / ds.scale - node.pos[0] - node.size[0] / 2;
    ds.offset[1] = height / 2 / ds.scale - node.pos[1] - node.size[1] / 2 + 15;
    app.canvas.deselectAll?.();
    app.canvas.setDirty(true, true);
}"""


def template_of(node):
    """The smallest template that has it; None where none has."""
    found = []
    for path in sorted((ROOT / "workflows").glob("*.json")):
        nodes = json.loads(path.read_text())["nodes"]
        if any(inner["type"] == node and inner.get("mode", 0) == 0 for inner in nodes):
            found.append((len(nodes), path.stem))
    return min(found)[1] if found else None


def main():
    wanted = sys.argv[1:] or sorted(path.stem for path in DOCS.glob("*.md"))
    by_template = {}
    for node in wanted:
        by_template.setdefault(template_of(node), []).append(node)
    with tempfile.TemporaryDirectory() as base, Server(COMFYUI, Path(base)) as server, sync_playwright() as playwright:
        titles = {name: info["display_name"] for name, info in server.get("/object_info").items()}
        page = launch(playwright).new_page(viewport=SIZE)
        editor = Editor(page, server.url)
        editor.start()
        editor.settle()
        for template, nodes in by_template.items():
            if template:
                editor.open_template("Personalize", template)
                if template not in NOT_RUN:
                    assert editor.run() == []
            for node in nodes:
                if not template:
                    editor.blank()
                    editor.add(titles[node], "Personalize")
                page.mouse.move(5, 500)
                page.evaluate(FOCUS, [node, SIZE["width"], SIZE["height"], SHOWN[1]])
                page.wait_for_function(STILL, polling=300)
                left, top = ((SIZE[side] - shown) // 2 for side, shown in zip(("width", "height"), SHOWN, strict=True))
                clip = {"x": left, "y": top, "width": SHOWN[0], "height": SHOWN[1]}
                picture = Image.open(BytesIO(page.screenshot(clip=clip))).convert("RGB")
                height = round(WIDTH * picture.height / picture.width)
                picture.resize((WIDTH, height), Image.Resampling.LANCZOS).save(DOCS / f"{node}.jpg", quality=85)
                print(node, template or "alone")


if __name__ == "__main__":
    main()
