"""What a benchmark draws: held-out identities with their references, real pictures, prompts, and the base."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from .base_model import CONFIGS
from .generate import Sampling
from .identities import find_identities
from .shared import POCKET, PersonalizeError

if TYPE_CHECKING:
    from .benchmark import Benchmark

POSES_AND_PLACES = (  # pose, expression, background: every expression and pose, and eight backgrounds
    ("front", "smiling", "beach"),
    ("left", "sad", "forest"),
    ("right", "surprised", "city"),
    ("front", "angry", "mountains"),
    ("left", "smiling", "blue"),
    ("right", "sad", "yellow"),
    ("front", "surprised", "purple"),
    ("front", "sleeping", "grey"),
)
PROMPTS = (
    "a photo of a {class}",
    "a close-up photo of a {class}, smiling",
    "a photo of a {class} on the beach",
    "a photo of a {class} in the jungle",
    "a photo of a {class} in front of a city at night",
    "a photo of a {class} wearing a red hat",
    "a photo of a {class} looking surprised",
    "a black and white photo of a {class}",
)
CLASS = "person"
TRUTH, EXCHANGED = "truth, drawn anew", "truth, people exchanged"
"""Beside the pocket's methods: what a perfect method would draw, and the same with everybody under the next one's name, for
what each measure makes of it."""
NEEDED = 10
"""Pictures of a person in the original experiment."""
FIRST_OF_TRAINING, TRAIN_IDENTITIES, REAL_HATS = 1000, 2000, 0.35
CONFIG = tomllib.loads((CONFIGS / "pocket_ip_adapter.toml").read_text(encoding="utf-8"))
"""How the pocket's adapters are trained."""
SHOWN = {name: CONFIG["ip_adapter"][name] for name in ("reference_crops", "smallest_crop", "largest_crop")}
CROP, WHOLE = (SHOWN["smallest_crop"], SHOWN["largest_crop"]), 1 / 3
"""Of pocket references one in three is a whole portrait, the others are random squares, with a side between these shares
of the portrait's: a face's corner, a hat, the clothes, as of a person's photographs some show the whole, most a part.
Whole portraits alone, each in the same place, hide so little that the mean of ten is as good as anything. In training, so
many squares of each picture are shown beside it, each as often as the picture."""
START = {
    "adapter_kind": "plus",
    "resampler_depth": 2,
    "distil_steps": 3000,
    "max_train_steps": 6000,
    "learning_rate": 1e-3,
    "reference_crops": 0,
    "smallest_crop": None,
    "largest_crop": None,
    "aggregation": "average",
    "max_references": 1,
}
"""Of the pocket adapter that all four start from: it sees the patches of one reference, and began as the base adapter,
which comes with the pack."""


@dataclass(frozen=True)
class Prompt:
    """A prompt of one identity, with the subject's words left open."""

    text: str
    """`{subject}` is replaced, by "cat" or "ohwx cat"."""
    wishes: Mapping[str, str]


@dataclass(frozen=True)
class Person:
    """A held-out identity."""

    name: str
    """Of its folder."""
    class_name: str
    references: tuple[Path, ...]
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class Material:
    """Everything that does not depend on the method."""

    base: str
    image_encoder: str
    ip_adapter: str | None
    """That all four start from; None if they start from scratch, or `start` says from what."""
    start: Mapping[str, Any] | None
    """Options of the training that makes what all four start from."""
    people: tuple[Person, ...]
    real: Path
    """Real pictures, a folder for each person."""
    train: Path
    """Identities to train on."""
    sampling: Sampling
    training: Mapping[str, Any]
    """Options of every adapter's training."""
    measures: Mapping[str, Any]
    """Options of training.evaluate."""
    ships: bool
    """Whether trained adapters come with the pack."""
    truths: tuple[str, ...] = ()
    """Titles of what is measured beside the methods."""


def pocket_material(options: "Benchmark", folder: Path) -> Material:
    """Drawn by the generator: who is held out, what a perfect method would draw, and if need be what to train on."""
    from .pocket.attributes import ATTRIBUTES, BACKGROUND_COLOURS
    from .pocket.captions import EXPRESSION_WORDS, PLACE_WORDS, POSE_WORDS
    from .pocket.data import identity
    from .pocket.files import ADAPTER, CHECKPOINT, IMAGE_ENCODER
    from .pocket.photos import SUBJECTS, write_identities

    held = folder / "held_out"
    folders = write_identities(held, 0, options.identities, options.references, CROP, WHOLE)
    wishes = [dict(zip(("pose", "expression", "background"), wish, strict=True)) for wish in POSES_AND_PLACES]
    texts = []
    for wish in wishes:
        colour = wish["background"] in BACKGROUND_COLOURS
        place = f"on a {wish['background']} background" if colour else PLACE_WORDS[wish["background"]][0]
        expression, pose = EXPRESSION_WORDS[wish["expression"]][0], POSE_WORDS[wish["pose"]][0]
        texts.append(f"{'an' if expression[0] in 'aeiou' else 'a'} {expression} {{subject}}, {pose}, {place}")
    prompts = tuple(Prompt(text, wish) for text, wish in zip(texts, wishes, strict=True))
    people = []
    real = folder / "real"
    for number, own in enumerate(tqdm(folders, desc="Drawing real pictures", unit=" identities", leave=False)):
        who, to = identity(SUBJECTS, number), real / own.name
        references = tuple(sorted(own.glob("*.png")))
        people.append(Person(own.name, who.kind, references, prompts))
        other = folder / "generated" / EXCHANGED / folders[number - 1].name
        if (to / ATTRIBUTES).exists():
            continue
        for where, salt in ((to, 2), (folder / "generated" / TRUTH / own.name, 4), (other, 4)):
            _draw_truth(where, number, wishes, options.seeds, salt)
        (to / ATTRIBUTES).write_text((own / ATTRIBUTES).read_text())
    trained = CONFIG["training"]
    small = {} if options.max_train_steps is None else {"distil_steps": 1, "max_train_steps": options.max_train_steps}
    return Material(
        base=str(POCKET / CHECKPOINT),
        image_encoder=str(POCKET / IMAGE_ENCODER),
        ip_adapter=options.ip_adapter,
        start=None if options.ip_adapter else START | {"distil_from": str(POCKET / ADAPTER)} | small,
        people=tuple(people),
        real=real,
        train=folder / "train",
        sampling=Sampling(options.resolution or 64, 10, 4.0, options.batch_size or 50, "dpm++"),
        training={
            **trained,
            **SHOWN,
            "max_train_steps": options.max_train_steps or trained["max_train_steps"],
            "train_batch_size": options.train_batch_size or trained["train_batch_size"],
            "lr_warmup_steps": min(trained["lr_warmup_steps"], options.max_train_steps or trained["lr_warmup_steps"]),
            "validation_identities": min(8, (options.train_identities or TRAIN_IDENTITIES) // 2),
        },
        measures={"features": "judge", "clip": "pocket"},
        ships=not options.train,
        truths=(TRUTH, EXCHANGED),
    )


def _draw_truth(to: Path, number: int, wishes: Sequence[Mapping[str, str]], seeds: int, salt: int) -> None:
    """An identity as the prompts ask for it, by the generator."""
    from .pocket.attributes import Scene, Subject
    from .pocket.data import identity
    from .pocket.draw import draw
    from .pocket.photos import SUBJECTS

    to.mkdir(parents=True, exist_ok=True)
    who = identity(SUBJECTS, number)
    for i, wish in enumerate(wishes):
        for seed in range(seeds):
            rng = np.random.default_rng([SUBJECTS, number, i, seed, salt])
            subject = Subject(who, wish["pose"], wish["expression"], bool(rng.random() < REAL_HATS))
            scene = Scene((subject,), wish["background"], seed=int(rng.integers(2**31)))
            draw(scene).save(to / f"p{i:02}-s{seed}.png")


def draw_training_set(options: "Benchmark", material: Material) -> None:
    """The pocket identities to train on, none of which is held out."""
    from .pocket.photos import write_identities

    write_identities(
        material.train, FIRST_OF_TRAINING, options.train_identities or TRAIN_IDENTITIES, options.references + 1
    )


def real_material(options: "Benchmark", folder: Path) -> Material:
    """Of photographs: people with ten pictures or more, or as many as there are references, are drawn, others trained on.

    Raises:
        PersonalizeError: there are not enough people.
    """
    data = Path(options.data or "").expanduser()
    sets = find_identities(data).sets
    needed = min(NEEDED, options.references)
    enough = [one for one in sorted(sets) if len(sets[one]) >= needed]
    order = np.random.default_rng(0).permutation(len(enough))
    held = sorted(enough[i] for i in order[: options.identities])
    rest = [one for one in sorted(sets) if one not in held]
    if not held or not rest:
        raise PersonalizeError(
            f"{data} has {len(sets)} people with two pictures or more, {len(enough)} of them with {needed} or more: "
            f"--identities {options.identities} leaves {len(rest)} to train on and {len(held)} to draw; hold out fewer."
        )
    for part, chosen in (("real", held), ("train", rest)):
        _link(folder / part, {one.name: one for one in chosen})
    prompts = tuple(Prompt(text.replace("{class}", "{subject}"), {}) for text in PROMPTS)
    people = tuple(Person(one.name, CLASS, sets[one][: options.references], prompts) for one in held)
    measures = {"features": "inception", "inception_weights": options.inception_weights}
    return Material(
        base=options.base or "",
        image_encoder=options.image_encoder or "",
        ip_adapter=options.ip_adapter,
        start=None,
        people=people,
        real=folder / "real",
        train=folder / "train",
        sampling=Sampling(options.resolution or 512, 20, 7.5, options.batch_size or 4, "dpm++"),
        training={
            "max_train_steps": options.max_train_steps or 20_000,
            "train_batch_size": options.train_batch_size or 8,
            "resolution": options.resolution or 512,
            "class_name": CLASS,
            "snr_gamma": 5.0,
            "use_ema": True,
        },
        measures=measures | {name: getattr(options, name) for name in ("clip", "dino") if getattr(options, name)},
        ships=False,
    )


def _link(folder: Path, targets: Mapping[str, Path]) -> None:
    """A folder of links to folders, exactly these.

    Raises:
        PersonalizeError: it holds others, of another run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if others := sorted(path.name for path in folder.iterdir() if path.name not in targets):
        raise PersonalizeError(
            f"{folder} holds {', '.join(others[:3])}, which this run does not: name another --output_dir, or empty it."
        )
    for name, target in targets.items():
        if not (folder / name).exists():
            (folder / name).symlink_to(target.resolve(), target_is_directory=True)


def subset(folder: Path, to: Path, names: Sequence[str]) -> Path:
    """Some identities of a folder, as links; returns `to`."""
    _link(to, {name: folder / name for name in names})
    return to


def with_trigger(text: str, class_name: str) -> str:
    """A caption that says "a cat" as one that says "a {trigger} {class}"."""
    return re.sub(rf"\b{re.escape(class_name)}\b", "{trigger} {class}", text, count=1)
