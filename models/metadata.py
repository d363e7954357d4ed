"""What our files say of themselves: the method, for which base, by which words it is called."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import PersonalizeError

FORMAT = "1"
FOLDERS = {
    "lora": "loras",
    "textual_inversion": "embeddings",
    "dreambooth": "checkpoints",
    "custom_diffusion": "loras",
    "ip_adapter": "ipadapter",
    "subject_diffusion": "subject_diffusion",
}
"""Of ComfyUI's models, where each method's files are found."""
METHOD_TITLES = {
    "lora": "LoRA",
    "textual_inversion": "Textual Inversion",
    "dreambooth": "DreamBooth",
    "custom_diffusion": "Custom Diffusion",
    "ip_adapter": "IP-Adapter",
    "subject_diffusion": "Subject-Diffusion",
}
"""What people call each method of a file."""


@dataclass(frozen=True)
class About:
    """The metadata of one personalisation file."""

    method: str
    """One of FOLDERS."""
    base_family: str = ""
    """Of models.base_models."""
    base_name: str = ""
    base_hash: str = ""
    """SHA-256 of the base's file; empty where it was a folder."""
    base_fingerprint: str = ""
    trigger: str = ""
    """The words that call the subject."""
    class_name: str = ""
    """The noun of its class."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the training."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Keys that other tools read, `modelspec.*` and `ss_*`."""

    @property
    def call(self) -> str:
        """What prompts in ComfyUI call the subject by: the trigger and its class, as its captions did; learned words have
        in their trigger all that they need.
        """
        whole = self.method in ("textual_inversion", "custom_diffusion") or self.trigger == self.class_name
        return self.trigger if whole else f"{self.trigger} {self.class_name}".strip()

    def as_metadata(self) -> dict[str, str]:
        """Strings, as safetensors keeps them; what is empty is left out."""
        own = {
            "method": self.method,
            "format": FORMAT,
            "base_family": self.base_family,
            "base_name": self.base_name,
            "base_hash": self.base_hash,
            "base_fingerprint": self.base_fingerprint,
            "trigger": self.trigger,
            "class_name": self.class_name,
            "settings": json.dumps(dict(self.settings), sort_keys=True) if self.settings else "",
        }
        return {f"personalize.{key}": value for key, value in own.items() if value} | dict(self.extra)


def title_of_method(method: str) -> str:
    """What people call it; one that this version does not know by its own name."""
    return METHOD_TITLES.get(method, method)


def folder_of(method: str, difference: bool = False) -> str:
    """Of ComfyUI's models, where a file is found.

    Args:
        method: one of FOLDERS.
        difference: of DreamBooth's: from a checkpoint, not a whole one.
    """
    return "loras" if difference else FOLDERS[method]


def read_about(metadata: Mapping[str, str], name: str) -> About | None:
    """The reverse of `About.as_metadata`; None where the file is not ours.

    Raises:
        PersonalizeError: the file is of a later format.
    """
    if "personalize.method" not in metadata:
        return None
    if metadata.get("personalize.format") != FORMAT:
        raise PersonalizeError(
            f"{name} has format {metadata.get('personalize.format')}, this version of Personalize reads format {FORMAT}: "
            "update Personalize."
        )
    own = {key.removeprefix("personalize."): value for key, value in metadata.items()}
    fields = ("method", "base_family", "base_name", "base_hash", "base_fingerprint", "trigger", "class_name")
    try:
        settings = json.loads(own.get("settings") or "{}")
    except ValueError:
        raise PersonalizeError(f"{name} is damaged: its personalize.settings cannot be read.") from None
    extra = {key: value for key, value in metadata.items() if not key.startswith("personalize.")}
    return About(**{key: own.get(key, "") for key in fields}, settings=settings, extra=extra)
