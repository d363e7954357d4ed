"""Write what the help pages have from the nodes' schemas: title, description, picture, inputs and outputs.

    python tests/host/help_pages.py

What stands below the line in nodes/web/docs/<node>.md is written by hand, and stays.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "nodes" / "web" / "docs"
LINE = "<!-- Above: the node's schema, by tests/host/help_pages.py. Below: what it does not say. -->\n"
GROWING = "COMFY_AUTOGROW_V3"


def page_of(info: dict[str, Any], before: str = "") -> str:
    """A node's help page from what /object_info says of it, and from the page as it was: what is below the line."""
    title = info["display_name"]
    inputs = [
        _input(key, *spec) for group in ("required", "optional") for key, spec in info["input"].get(group, {}).items()
    ]
    outputs = list(zip(info["output_name"], info["output_tooltips"] or [], strict=True))
    tables = [_table(kind, rows) for kind, rows in (("input", inputs), ("output", outputs)) if rows]
    head = [f"# {title}", info["description"], f"![The node {title}]({info['name']}.jpg)", *tables, LINE]
    return "\n\n".join(head) + before.partition(LINE)[2]


def _input(key: str, kind: str, options: dict[str, Any]) -> tuple[str, str]:
    """Its name as the node shows it, and what it is for."""
    if kind != GROWING:
        return options.get("display_name", key), options["tooltip"]
    template = options["template"]
    ((_, own),) = (one for group in template["input"].values() for one in group.values())
    return f"{template['prefix']}0, ...", f"{options['tooltip']} {own['tooltip']}"


def _table(kind: str, rows: list[tuple[str, str]]) -> str:
    """Neighbours that mean the same share a row."""
    shared: list[tuple[list[str], str]] = []
    for name, meaning in rows:
        if shared and shared[-1][1] == meaning:
            shared[-1][0].append(name)
        else:
            shared.append(([name], meaning))
    lines = [f"| {kind} | meaning |", "|---|---|"]
    for names, meaning in shared:
        cell = meaning.replace("\\", "\\\\").replace("|", "\\|")
        lines.append(f"| {', '.join(map(_marked, names))} | {cell} |")
    return "\n".join(lines)


def _marked(name: str) -> str:
    """What is in brackets behind it stays out of the mark, which no line of the narrow page breaks."""
    own, bracket, remark = name.partition(" (")
    return f"`{own}`{bracket}{remark}"


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from conftest import COMFYUI  # isort: skip
    from pack.training.demo.server import Server

    with tempfile.TemporaryDirectory() as base, Server(COMFYUI, Path(base)) as server:
        for name, info in server.get("/object_info").items():
            if name.startswith("Personalize"):
                path = DOCS / f"{name}.md"
                path.write_text(page_of(info, path.read_text() if path.exists() else ""))


if __name__ == "__main__":
    main()
