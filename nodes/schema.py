"""What the nodes' schemas share: wire types, and fields that only newer hosts have."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from comfy_api.latest import io

from ..models.errors import PersonalizeError

CATEGORY = "Personalize"
ADVANCED = {"advanced": True}
SHARE: dict[str, Any] = {"min": 0.0, "max": 1.0, "step": 0.01}
"""Of an input that is a part of something."""
CFG: dict[str, Any] = {"min": 0.0, "max": 100.0, "step": 0.1}
"""Of a guidance scale."""

# Wires of ComfyUI_IPAdapter_plus, which work with our nodes too: the file's tensors, {"image_proj": {...}, "ip_adapter": {...}}.
IPAdapterType = io.Custom("IPADAPTER")
# Its encoded pictures: one raw tensor, [n, D] or [n, T, H].
EmbedsType = io.Custom("EMBEDS")
ReferencesType = io.Custom("REFERENCES")
AttentionMapsType = io.Custom("ATTENTION_MAPS")
SubjectDiffusionType = io.Custom("SUBJECT_DIFFUSION")
SubjectsType = io.Custom("SUBJECTS")


def schema(search_aliases: list[str], **fields: Any) -> io.Schema:
    """An io.Schema; search aliases are given to hosts that know them."""
    if "search_aliases" in io.Schema.__dataclass_fields__:
        fields["search_aliases"] = search_aliases
    return io.Schema(category=CATEGORY, **fields)


class Node(io.ComfyNode):
    """A node whose inputs are there: what is not optional and comes as nothing is told."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = cls.__dict__.get("execute")
        if own is not None and not hasattr(own.__func__, "__wrapped__"):  # the host's locked copies have it wrapped
            cls.execute = classmethod(_with_all_inputs(own.__func__))


def _with_all_inputs(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    signature = inspect.signature(execute)
    # Of an image encoder `encoder.input_size` has more to say.
    needed = [
        name
        for name, one in signature.parameters.items()
        if one.default is one.empty and one.kind != one.VAR_KEYWORD and name != "clip_vision"
    ]

    @wraps(execute)
    def checked(*given: Any, **named: Any) -> io.NodeOutput:
        there = signature.bind_partial(*given, **named).arguments
        for name in needed:
            if name in there and there[name] is None:
                raise PersonalizeError(
                    f"{name} is empty: the node that it comes from has none. Choose a file there that has it, or connect that "
                    "node's own input."
                )
        return execute(*given, **named)

    return checked
