"""What a file is that was taken for another."""

from collections.abc import Collection

from .delta import CHANGES
from .errors import PersonalizeError
from .metadata import About, folder_of

KINDS = {
    "lora": "a LoRA",
    "textual_inversion": "a learned word",
    "dreambooth": "a DreamBooth checkpoint",
    "custom_diffusion": "a file of Custom Diffusion",
    "ip_adapter": "an IP-Adapter",
    "subject_diffusion": "a file of Subject-Diffusion",
    "base_model": "a checkpoint",
    "image_encoder": "an image encoder",
    "references": "saved references",
    "controlnet": "a ControlNet",
}
"""By the method that a file of ours names, and for others' files by what they would name."""
PLACES = {
    "base_model": "checkpoints",
    "image_encoder": "clip_vision",
    "references": "references",
    "controlnet": "controlnet",
}
"""Of ComfyUI's models, where those are found that no method makes; the others' are in `metadata.FOLDERS`."""
MARKS = (
    (("lora_", ".lora"), "lora"),
    (("model.diffusion_model.", "first_stage_model."), "base_model"),
    (("image_proj.", "ip_adapter."), "ip_adapter"),
    (("vision_model.", "visual."), "image_encoder"),
    (("emb_params", "string_to_param", "clip_l", "clip_g"), "textual_inversion"),
    (("control",), "controlnet"),
)
"""What the names of tensors have in them, in files that say nothing of themselves."""


def kind_of(names: Collection[str], about: About | None) -> tuple[str, str] | None:
    """A file's kind, and its folder of ComfyUI's models; None where nothing tells.

    Args:
        names: of its tensors.
        about: what it says of itself.
    """
    found = (method for marks, method in MARKS if any(mark in name for name in names for mark in marks))
    method = about.method if about else next(found, "")
    if method == "dreambooth" and any(name.endswith(CHANGES) for name in names):
        return "a difference of DreamBooth", folder_of(method, difference=True)
    return (KINDS[method], PLACES.get(method) or folder_of(method)) if method in KINDS else None


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
