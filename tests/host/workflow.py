"""Turn a workflow as the editor saves it into the prompt that ComfyUI's API takes."""

from collections.abc import Mapping
from typing import Any

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
SKIPPED = {"Note", "MarkdownNote", "Reroute", "PrimitiveNode"}
MUTED, BYPASSED = 2, 4


def to_prompt(workflow: Mapping[str, Any], object_info: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The API prompt of a workflow.

    Args:
        workflow: UI format: nodes with `widgets_values`, links as [id, from, slot, to, slot, type].
        object_info: the server's /object_info, which gives the order of a node's widgets.

    Raises:
        KeyError: a node type that the server does not know.
    """
    links = {link[0]: (str(link[1]), link[2]) for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in SKIPPED or node.get("mode") in (MUTED, BYPASSED):
            continue
        values = _widget_values(node, object_info[node["type"]])
        linked = {item["name"]: links[item["link"]] for item in node.get("inputs", []) if item.get("link") is not None}
        inputs = values | {name: [source, slot] for name, (source, slot) in linked.items()}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _widget_values(node: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    saved = list(node.get("widgets_values") or [])
    values = {}
    for group in ("required", "optional"):
        for name, spec in info["input"].get(group, {}).items():
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            if not (isinstance(kind, list) or kind in WIDGETS) or options.get("forceInput"):
                continue
            if not saved:
                break
            values[name] = saved.pop(0)
            if options.get("control_after_generate") or options.get("image_upload"):
                saved = saved[1:]  # the button or mode that the editor saves beside it
    return values
