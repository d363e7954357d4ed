"""The stages of a benchmark, each of which takes up what is there already: adapters, pictures, trainings, figures."""

import gc
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from .base_model import BaseModel, load_base
from .benchmark_data import CONFIG, Material, Person, draw_training_set, subset, with_trigger
from .encoding import Cache
from .evaluate import Evaluation, evaluate
from .features import clip, judge
from .generate import Job, ReferencePrompts, Sampling, draw_pictures, noise_seed
from .image_encoder import load_image_encoder
from .personalization import put_on
from .plots import Mark
from .run import METHODS, personalize
from .settings import make_groups, make_settings
from .shared import (
    BEFORE_PROJECTION,
    METHOD_TITLES,
    SELF_ATTENTION,
    TRIGGER,
    IPAdapter,
    bootstrap,
    likeness,
    mean_by_group,
    picture_paths,
    plural,
    read_ip_adapter,
)

if TYPE_CHECKING:
    from .benchmark import Benchmark

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One way to make an image prompt of several references."""

    title: str
    trained: str
    """The name of the adapter: `TRAININGS` says how it was trained."""
    aggregation: str
    """When it is used."""
    single: bool = False
    """Whether it sees the first reference only."""


TRAININGS: dict[str, dict[str, Any]] = {
    "single": {"aggregation": "average", "max_references": 1},
    "max": {"aggregation": "max"},
    "average": {"aggregation": "average"},
    "self_attention": {
        name: CONFIG["ip_adapter"][name]
        for name in ("aggregation", "aggregation_stage", "aggregator_lr", "warmup_loss_weight")
    },
}
"""What differs between the four: pooling is over the image encoder's features, self-attention over the tokens."""
ROWS = (
    Row("IP-Adapter", "single", "average", single=True),
    Row("IP-Adapter + max pooling", "max", "max"),
    Row("IP-Adapter + average pooling", "average", "average"),
    Row("IP-Adapter + self-attention", "self_attention", SELF_ATTENTION),
    Row("IP-Adapter, all side by side", "single", "concatenate"),
)
"""The last needs no training for several references: every token of every reference beside the others."""
TUNED = {name: METHOD_TITLES[name] for name in ("dreambooth", "lora", "textual_inversion", "custom_diffusion")}
NUMBERS, OF_PROMPTS = (1, 2, 3, 5, 7, 10), 2
"""How many references are tried for the plot, and with how many of the prompts."""


@dataclass(frozen=True)
class Measured:
    """What the report shows."""

    adapters: Mapping[str, Any]
    """As training.evaluate returns it, over all identities."""
    tuned: Mapping[str, Any] | None
    """Over the identities that every method was trained for."""
    numbers: Mapping[str, Sequence[tuple[float, Mark]]]
    """Likeness over the number of references, by row."""
    likeness: str
    """What that likeness is."""


def folder_of(folder: Path, title: str) -> Path:
    """Of a method's pictures."""
    return folder / "generated" / title


def agreed(found: T) -> T:
    """What the main process found, in all of them: each by itself would look while others write or remove."""
    return broadcast_object_list([found])[0]


def find_adapters(
    accelerator: Accelerator, options: "Benchmark", material: Material, folder: Path, shipped: Path
) -> dict[str, Path]:
    """The four trained adapters, by name: those of the pack, or trained now.

    Raises:
        PersonalizeError: whatever a training cannot do.
    """
    with_the_pack = {name: shipped / f"pocket_{name}.safetensors" for name in TRAININGS}
    if material.ships and all(path.exists() for path in with_the_pack.values()):
        return with_the_pack
    if options.preset == "pocket":
        with accelerator.main_process_first():
            draw_training_set(options, material)
    start = material.ip_adapter
    if material.start is not None:
        start = str(_trained(accelerator, "start", material, folder, {**material.training, **material.start}))
    common = {"ip_adapter": start, **material.training}
    return {name: _trained(accelerator, name, material, folder, common | own) for name, own in TRAININGS.items()}


def _trained(accelerator: Accelerator, name: str, material: Material, folder: Path, values: Mapping[str, Any]) -> Path:
    """The file of a training, made now if it is not there."""
    out = folder / "adapters" / name
    path = out / f"{name}.safetensors"
    if not agreed(path.exists()):
        accelerator.print(f"Training {name} in {out}")
        common = {
            "pretrained_model_name_or_path": material.base,
            "image_encoder": material.image_encoder,
            "instance_data_dir": str(material.train),
            "output_dir": str(out),
            "output_name": name,
            "cache_dir": str(folder / "cache"),
            "train_adapter": True,
        }
        personalize("ip_adapter", make_settings(METHODS["ip_adapter"][0], _without_none(common | dict(values))))
        accelerator.wait_for_everyone()  # the main process writes it
    return path


def jobs_of(person: Person, to: Path, seeds: int, references: int | None, subject: str | None = None) -> list[Job]:
    """Every prompt with every seed: the same noise for all methods.

    Args:
        person: whom to draw.
        to: where the pictures go.
        seeds: pictures of each prompt.
        references: how many of the references to show; None for none.
        subject: what the prompts call the person; the class by default.
    """
    shown = () if references is None else person.references[:references]
    return [
        Job(
            to / f"p{i:02}-s{seed}.png",
            prompt.text.replace("{subject}", subject or person.class_name),
            noise_seed(seed, i),
            shown,
            prompt.wishes,
        )
        for i, prompt in enumerate(person.prompts)
        for seed in range(seeds)
    ]


def _load(accelerator: Accelerator, where: str) -> BaseModel:
    base = load_base(where, torch.float16 if accelerator.device.type == "cuda" else torch.float32)
    base.pipeline.to(accelerator.device)
    base.pipeline.unet.requires_grad_(False)
    return base


def draw_adapters(
    accelerator: Accelerator, options: "Benchmark", material: Material, adapters: Mapping[str, Path], folder: Path
) -> None:
    """Every row's pictures of every identity."""
    plans = {
        row: [
            job
            for person in material.people
            for job in jobs_of(
                person,
                folder_of(folder, row.title) / person.name,
                options.seeds,
                1 if row.single else options.references,
            )
        ]
        for row in ROWS
    }
    _draw_rows(accelerator, options, material, adapters, {row: (row.title, jobs) for row, jobs in plans.items()})


def draw_numbers(
    accelerator: Accelerator, options: "Benchmark", material: Material, adapters: Mapping[str, Path], folder: Path
) -> None:
    """Pictures from 1 to 10 references, of two prompts with one seed each, for the plot."""
    for number in numbers_of(options):
        plans = {
            row: (
                f"{row.title}, {plural(number, 'reference')}",
                [
                    job
                    for person in material.people
                    for job in jobs_of(person, numbers_folder(folder, row, number) / person.name, 1, number)[
                        :OF_PROMPTS
                    ]
                ],
            )
            for row in ROWS
            if not row.single
        }
        _draw_rows(accelerator, options, material, adapters, plans)


def numbers_of(options: "Benchmark") -> list[int]:
    """How many references are tried."""
    return [number for number in NUMBERS if number <= options.references]


def numbers_folder(folder: Path, row: Row, number: int) -> Path:
    """Of the pictures from so many references."""
    return folder / "numbers" / f"{row.aggregation}-{number:02}"


def _draw_rows(
    accelerator: Accelerator,
    options: "Benchmark",
    material: Material,
    adapters: Mapping[str, Path],
    plans: Mapping[Row, tuple[str, Sequence[Job]]],
) -> None:
    titles = agreed([title for title, jobs in plans.values() if not _drawn(jobs)])
    todo = {row: plan for row, plan in plans.items() if plan[0] in titles}
    if not todo:
        return
    base = _load(accelerator, material.base)
    encoder = load_image_encoder(material.image_encoder).to(accelerator.device)
    for row, (title, jobs) in todo.items():
        adapter = IPAdapter.from_state(read_ip_adapter(adapters[row.trained]))
        showing = ReferencePrompts(base, adapter, encoder, row.aggregation, BEFORE_PROJECTION, options.weight)
        draw_pictures(accelerator, base, jobs, material.sampling, title, showing)
    del base, encoder, showing
    gc.collect()


def _drawn(jobs: Sequence[Job]) -> bool:
    return all(job.path.exists() for job in jobs)


def draw_tuned(accelerator: Accelerator, options: "Benchmark", material: Material, folder: Path) -> None:
    """Train each fine-tuning method for some identities, and draw these."""
    people = material.people[: options.tuned_identities]
    for method, title in TUNED.items():
        for person in tqdm(people, desc=title, unit=" identities", disable=not accelerator.is_main_process):
            to = folder_of(folder, title) / person.name
            subject = f"{TRIGGER} {person.class_name}"
            jobs = jobs_of(person, to, options.seeds, None, subject)
            if agreed(_drawn(jobs)):
                continue
            out = folder / "tuned" / method / person.name
            file = out / "result.safetensors"
            if not agreed(file.exists()):
                photos = folder / "tuned" / "photos" / person.name
                if accelerator.is_main_process:
                    _write_photos(person, photos)
                accelerator.wait_for_everyone()
                values = {
                    "pretrained_model_name_or_path": material.base,
                    "instance_data_dir": str(photos),
                    "class_name": person.class_name,
                    "trigger": TRIGGER,
                    "output_dir": str(out),
                    "output_name": "result",
                    "max_train_steps": options.tuned_steps,
                    "resolution": material.training.get("resolution"),
                    "checkpoints_total_limit": 1,
                }
                personalize(method, make_settings(METHODS[method][0], _without_none(values)))
                accelerator.wait_for_everyone()  # the main process writes the file
            _draw_one(accelerator, material.base, method, file, jobs, material.sampling, title)
            if accelerator.is_main_process:  # all have drawn
                shutil.rmtree(out / "checkpoints", ignore_errors=True)
                if method == "dreambooth":
                    file.unlink()  # a whole checkpoint for each identity would fill the disk


def _draw_one(
    accelerator: Accelerator,
    where: str,
    method: str,
    file: Path,
    jobs: Sequence[Job],
    sampling: Sampling,
    title: str,
) -> None:
    base = _load(accelerator, str(file) if method == "dreambooth" else where)
    if method != "dreambooth":
        put_on(base, method, file, TRIGGER)
    draw_pictures(accelerator, base, jobs, sampling, title)
    del base
    gc.collect()


def _write_photos(person: Person, to: Path) -> None:
    """The references with captions that call the person by the trigger."""
    to.mkdir(parents=True, exist_ok=True)
    for path in person.references:
        shutil.copyfile(path, to / path.name)
        caption = path.with_suffix(".txt")
        if caption.exists():
            (to / caption.name).write_text(with_trigger(caption.read_text(encoding="utf-8"), person.class_name))


def measure_all(options: "Benchmark", material: Material, folder: Path) -> Measured:
    """Every figure, with its interval; tables and plots into the report's folder."""
    report, cache = folder / "report", folder / "report" / "cache"

    def evaluated(generated: Sequence[Path], real: Path, name: str) -> Mapping[str, Any]:
        values = {
            "generated": [str(path) for path in generated],
            "real": str(real),
            "output_dir": str(report / name),
            "cache_dir": str(cache),
            "bootstrap_draws": options.bootstrap_draws,
            **({"trigger": TRIGGER} if name == "tuned" and "clip" in material.measures else {}),
            **material.measures,
        }
        return evaluate(make_groups((Evaluation,), values)[0])

    rows = [folder_of(folder, row.title) for row in ROWS]
    truths = [folder_of(folder, title) for title in material.truths]
    adapters = evaluated([*rows, *truths], material.real, "adapters")
    tuned = None
    if names := [person.name for person in material.people[: options.tuned_identities]]:
        some = folder / "subset"
        parts = [subset(path, some / path.name, names) for path in rows]
        parts += [folder_of(folder, title) for title in TUNED.values()]
        tuned = evaluated(parts, subset(material.real, some / "real", names), "tuned")
    numbers, kind = _likeness_over_numbers(options, material, folder, Cache(cache))
    return Measured(adapters, tuned, numbers, kind)


def _likeness_over_numbers(
    options: "Benchmark", material: Material, folder: Path, cache: Cache
) -> tuple[dict[str, list[tuple[float, Mark]]], str]:
    """By the judge, or of photographs by CLIP if there is one."""
    if material.measures["features"] == "judge":
        eye, feature, title = judge(cache, 32), "who", "the judge's likeness to the real pictures"
    elif "clip" in material.measures:
        eye, feature, title = clip(material.measures["clip"], cache, 32), "features", "CLIP-I"
    else:
        return {}, ""
    places = {person.name: i for i, person in enumerate(material.people)}

    def seen(root: Path) -> tuple[torch.Tensor, torch.Tensor]:
        paths = [path for name in places for path in picture_paths(root / name)]
        numbers = torch.tensor([places[path.parent.name] for path in paths])
        return eye.pictures(paths, root.name)[feature], numbers

    real, whose_real = seen(material.real)
    lines: dict[str, list[tuple[float, Mark]]] = {}
    for row in ROWS:
        for number in numbers_of(options) if not row.single else []:
            mine, whose = seen(numbers_folder(folder, row, number))
            value = mean_by_group(likeness(mine, real, whose, whose_real), whose)
            found = bootstrap(list(places), value, options.bootstrap_draws)
            lines.setdefault(row.title, []).append((number, Mark(found.value, found.interval)))
    return lines, title


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
