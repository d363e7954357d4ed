"""What the demo makes of a few photographs: each method's file, trained on them as a user trains it."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..pocket.captions import EXPRESSION_WORDS, PLACE_WORDS, POSE_WORDS, article
from ..pocket.files import CHECKPOINT, SUBJECTS
from ..run import METHODS, train
from ..settings import make_settings
from ..shared import (
    METHOD_TITLES,
    POCKET,
    SELF_ATTENTION,
    TRIGGER,
    PersonalizeError,
    folder_of,
    list_pictures,
    read_about,
    read_header,
    read_picture,
)

TITLES = {name: METHOD_TITLES[name] for name in ("textual_inversion", "lora", "custom_diffusion", "dreambooth")}
PLAIN, REFERENCES = "without", f"{METHOD_TITLES['ip_adapter']}, {SELF_ATTENTION}"
SUBJECT = METHOD_TITLES["subject_diffusion"]
ADAPTER = POCKET / "ipadapter" / "pocket_self_attention.safetensors"
BOX = (0.05, 0.05, 0.95, 1.0)
"""Where Subject-Diffusion draws the subject of the first photograph, which fills it: left, top, right, bottom."""
STEPS: int | None = None
"""Of each training; None: each method's own."""
PROMPTS = (
    {"expression": "smiling", "pose": "left", "background": "beach"},
    {"expression": "sad", "pose": "front", "background": "forest"},
    {"expression": "surprised", "pose": "right", "background": "mountains"},
    {"expression": "angry", "pose": "front", "background": "space"},
)
"""What each asks for, in the words of training.truth."""


@dataclass(frozen=True)
class Made:
    """One row of the sheet."""

    title: str
    method: str = ""
    """As everywhere; nothing where nothing was trained."""
    files: tuple[Path, ...] = ()
    subject: str = ""
    """What prompts call it in ComfyUI."""
    minutes: float = 0.0

    @property
    def shipped(self) -> bool:
        """Whether its files come with the pack."""
        return any(path.is_relative_to(POCKET) for path in self.files)

    @property
    def megabytes(self) -> float:
        """Of its files."""
        return sum(path.stat().st_size for path in self.files) / 1e6

    @property
    def kind(self) -> str:
        """The folder of its first file in ComfyUI's models."""
        return folder_of(self.method, any(".delta." in path.name for path in self.files))


def prompt_of(wishes: dict[str, str], subject: str) -> str:
    """As the pocket model's captions say it."""
    words = (
        EXPRESSION_WORDS[wishes["expression"]][0],
        POSE_WORDS[wishes["pose"]][0],
        PLACE_WORDS[wishes["background"]][0],
    )
    return f"a photo of {article(f'{words[0]} {subject}')}, {words[1]}, {words[2]}"


def place_of(pictures: Sequence[Path], class_name: str, folder: Path) -> Path:
    """Where a demo on these photographs trains and draws: others have another place."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in pictures) + class_name.encode()).hexdigest()
    return folder / f"training-{digest[:8]}"


def make(photos: Path, class_name: str, place: Path) -> list[Made]:
    """Every row; what was trained in this place before is taken.

    Raises:
        PersonalizeError: whatever a training cannot do; the first photograph, which Subject-Diffusion gets, has a mask of
            nothing.
    """
    photo = read_picture(list_pictures(photos)[0])
    if photo.mask is not None and not bool((photo.mask > 0.5).any()):
        raise PersonalizeError(
            f"The mask of {photo.name} is nowhere above one half: mark the subject in it, or leave it out."
        )
    rows = [
        Made(PLAIN, subject=class_name),
        Made(REFERENCES, "ip_adapter", (ADAPTER,), class_name),
        Made(SUBJECT, "subject_diffusion", (POCKET / SUBJECTS,), class_name),
    ]
    for number, (method, title) in enumerate(TITLES.items(), 1):
        out = place / method
        print(f"{number} of {len(TITLES)}: {title}", flush=True)
        started, note = time.monotonic(), out / "minutes.txt"
        values = {
            "pretrained_model_name_or_path": str(POCKET / CHECKPOINT),
            "instance_data_dir": str(photos),
            "class_name": class_name,
            "trigger": TRIGGER,
            "output_dir": str(out),
            "output_name": f"demo_{method}",
            "max_train_steps": STEPS,
        }
        files = sorted(out.glob("demo_*.safetensors"))
        if not files or not note.exists():
            files = train(method, make_settings(METHODS[method][0], values))
            note.write_text(str((time.monotonic() - started) / 60))
        rows.append(Made(title, method, tuple(files), called(files[0], class_name), float(note.read_text())))
    return rows


def called(file: Path, class_name: str) -> str:
    """What prompts call a file's subject by in ComfyUI."""
    about = read_about(read_header(file)[1], file.name)
    return about.call if about else f"{TRIGGER} {class_name}"
