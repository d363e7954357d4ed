"""What a file is that was taken for another."""

from collections.abc import Collection

from .delta import CHANGES
from .errors import PersonalizeError
from .metadata import About

OURS = {
    "lora": ("a LoRA", "loras"),
    "textual_inversion": ("a learned word", "embeddings"),
    "dreambooth": ("a DreamBooth checkpoint", "checkpoints"),
    "custom_diffusion": ("a file of Custom Diffusion", "loras"),
    "ip_adapter": ("an IP-Adapter", "ipadapter"),
    "subject_diffusion": ("a file of Subject-Diffusion", "subject_diffusion"),
    "base_model": ("a checkpoint", "checkpoints"),
    "image_encoder": ("an image encoder", "clip_vision"),
    "references": ("saved references", "references"),
}
"""By what a file of ours says of itself: its kind, and the folder of ComfyUI's models."""
DIFFERENCE = ("a difference of DreamBooth", "loras")
THEIRS = (
    (("lora_", ".lora"), ("a LoRA", "loras")),
    (("model.diffusion_model.", "first_stage_model."), ("a checkpoint", "checkpoints")),
    (("image_proj.", "ip_adapter."), ("an IP-Adapter", "ipadapter")),
    (("vision_model.", "visual."), ("an image encoder", "clip_vision")),
    (("emb_params", "string_to_param", "clip_l", "clip_g"), ("a learned word", "embeddings")),
    (("control",), ("a ControlNet", "controlnet")),
)
"""Of others' files, by what a tensor's name has in it."""


def kind_of(names: Collection[str], about: About | None) -> tuple[str, str] | None:
    """A file's kind, and its folder of ComfyUI's models; None where nothing tells.

    Args:
        names: of its tensors.
        about: what it says of itself.
    """
    if about is not None:
        if about.method == "dreambooth" and any(name.endswith(CHANGES) for name in names):
            return DIFFERENCE
        return OURS.get(about.method)
    found = (kind for marks, kind in THEIRS if any(mark in name for name in names for mark in marks))
    return next(found, None)


def taken_for(wanted: str, name: str, names: Collection[str], about: About | None) -> PersonalizeError:
    """For a file that is not what it was taken for.

    Args:
        wanted: such as "a LoRA".
        name: the file's.
        names: of its tensors.
        about: what it says of itself.
    """
    kind = kind_of(names, about)
    if kind is None:
        first = min(names, default="")
        return PersonalizeError(f"{name} is not {wanted}{f' (it begins with {first})' if first else ''}.")
    return PersonalizeError(f"{name} is {kind[0]}, not {wanted}: its place is models/{kind[1]}, for its own loader.")
