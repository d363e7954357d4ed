"""What the nodes' schemas share: wire types, and fields that only newer hosts have."""

from typing import Any

from comfy_api.latest import io

CATEGORY = "Personalize"
ADVANCED = {"advanced": True}

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
