"""Measure generated pictures against real ones: quality, likeness and prompt following, each with a 95 % interval.

    python -m training.evaluate --generated PICTURES --real PHOTOGRAPHS --output_dir FOLDER

Give --generated once for each method that is to be compared. A folder holds either the pictures of one subject or, for
several, a folder for each (ann/01.png, ben/01.png, ...), by the same names in generated and real folders. Beside a
generated picture NAME.png may lie NAME.txt, its prompt, and NAME.json, what the prompt asked for ({"pose": "left",
"expression": "sad", "background": "beach"}); in an identity's real folder attributes.json, who it is ({"kind": "dog",
"fur": "brown"}). What is not there is not measured.

With --pretrained_model_name_or_path and --prompt, pictures of every real identity are drawn first, with fixed seeds, by
that base with a LoRA, a learned word, Custom Diffusion or an IP-Adapter; a run that was stopped goes on, and accelerate
launch shares the work.

The default measures pocket portraits. For photographs: --features inception --inception_weights FILE for FID, KID and
IS, --clip openai/clip-vit-base-patch32 for CLIP-I and CLIP-T, --dino facebook/dino-vits16 for DINO, as DreamBench has
them. The folder gets table.md, figures.json with everything, and a picture of each figure.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import features
from .dataset import visible_picture
from .drawing import Drawing, check_drawing, check_no_drawing, draw_first
from .encoding import Cache
from .figure_kinds import KINDS
from .figures import Figure, Views, differences, is_finite, measure, remarks
from .look import check_writable, tell
from .options import option
from .picture_sets import PictureSet, check_identities, find_set, names_of, prompts_of
from .plots import Mark, bar_plot, number
from .settings import exit_status, make_groups, read_values
from .shared import PersonalizeError
from .truth import attributes_of, wishes_of

REAL = "real pictures"
LEAST_DRAWS = 20
"""For an interval."""


@dataclass
class Evaluation:
    """Evaluation"""

    generated: list[str] = option(  # noqa: RUF009 - a list of its own for each
        [], "folder with generated pictures, or with a folder of them for each identity; give it once for each method"
    )
    real: str | None = option(None, "folder with real pictures, by identity if the generated ones are")
    output_dir: str | None = option(None, "folder for the table, the figures and their pictures")
    features: str = option(
        "judge", "what FID, KID and IS see: the judge of pocket portraits, or Inception", ("judge", "inception")
    )
    inception_weights: str | None = option(
        None,
        "with --features inception: its weights, torch-fidelity's weights-inception-2015-12-05-6726825d.pth; download "
        "fetches them (needs the network)",
    )
    clip: str | None = option(
        None, "a CLIP for CLIP-I and CLIP-T: a folder of transformers, a hub id (needs the network), or pocket"
    )
    dino: str | None = option(None, "a ViT for DINO: a folder of transformers, or a hub id (needs the network)")
    trigger: str | None = option(None, "the word for your subject in the prompts, which CLIP does not know: left out")
    bootstrap_draws: int = option(
        1000, "how often identities are drawn for the intervals, 20 times or more; 0 makes none", least=0
    )
    seed: int = option(0, "of these draws", least=0, below=2**32)
    batch_size: int = option(32, "pictures that a network sees at once", least=1)
    cache_dir: str | None = option(None, "folder for what networks said of pictures; by default in the output folder")


@dataclass(frozen=True)
class Material:
    """What was found before anything is loaded."""

    methods: list[PictureSet]
    real: PictureSet
    prompts: dict[str, list[str]]
    """Of each picture, by method."""
    wishes: dict[str, list[dict[str, str]]]
    known: dict[str, dict[str, str]]


def main(arguments: list[str] | None = None) -> int:
    """What `python -m training.evaluate` does; returns the exit status: 1 if something is wrong, and was said."""

    def work() -> None:
        groups = (Evaluation, Drawing)
        given, values = read_values(groups, "python -m training.evaluate", __doc__ or "", arguments)
        options, drawing = make_groups(groups, {**values, **given})
        if drawing.pretrained_model_name_or_path:
            drawn = _draw(options, drawing)
            options = replace(options, generated=[*options.generated, str(drawn)])
        else:
            _check_no_drawing(options, drawing)
        if int(os.environ.get("RANK", "0")) == 0:
            evaluate(options)

    return exit_status(work)


def _draw(options: Evaluation, drawing: Drawing) -> Path:
    """The pictures, drawn.

    Raises:
        PersonalizeError: a line for each problem.
    """
    problems: list[str] = []
    read_too = [Path(options.output_dir or "") / "drawn", *([Path(drawing.references)] if drawing.references else [])]
    checks: list[tuple[Any, ...]] = [(_options, options, read_too), (check_drawing, drawing)]
    for check, *given in checks:
        tell(problems, check, *given)
    problems = [line for line in problems if not line.startswith("--generated is missing")]
    real = Path(options.real or "").expanduser()
    if options.real:
        tell(problems, find_set, real, REAL)
    if problems:
        raise PersonalizeError("\n".join(problems))
    return draw_first(drawing, real, Path(options.output_dir or "").expanduser(), options.seed)


def _check_no_drawing(options: Evaluation, drawing: Drawing) -> None:
    """Raises PersonalizeError, a line for each problem, where something is to be drawn without a base."""
    problems = list[str]()
    tell(problems, check_no_drawing, drawing)
    if problems:
        tell(problems, _options, options)
        raise PersonalizeError("\n".join(problems))


def evaluate(options: Evaluation) -> dict[str, Any]:
    """Measure, print the table, and write everything into the output folder.

    Returns:
        What figures.json holds: "figures" by method and name, "differences", "remarks", "settings".

    Raises:
        PersonalizeError: whatever the user can mend, a line for each problem.
        OSError: a file cannot be written.
    """
    material = look(options)
    cache = Cache(Path(options.cache_dir or Path(options.output_dir or ".") / "cache").expanduser())
    methods, real = _view(options, material, cache)
    figures = {
        views.pictures.name: {
            name: figure
            for name, figure in measure(views, real, material.known, options.bootstrap_draws, options.seed).items()
            if is_finite(figure)
        }
        for views in (*methods, real)
    }
    compared = {name: found for name, found in figures.items() if name != REAL}
    result: dict[str, Any] = {
        "figures": {method: {name: f.as_json() for name, f in found.items()} for method, found in figures.items()},
        "differences": differences(compared),
        "remarks": remarks(methods, real, options.bootstrap_draws),
        "settings": asdict(options),
    }
    _write(result, figures, Path(options.output_dir or ".").expanduser())
    return result


def look(options: Evaluation) -> Material:
    """Folders, pictures, what lies beside them, networks and output, before anything is loaded.

    Raises:
        PersonalizeError: a sentence for each problem, a line each.
    """
    problems = list[str]()
    told = partial(tell, problems)
    told(_options, options)
    folders = [Path(folder).expanduser() for folder in options.generated]
    names = [f"{name} (generated)" if name == REAL else name for name in names_of(folders)]
    sets = [told(find_set, folder, name) for folder, name in zip(folders, names, strict=True)]
    methods: list[PictureSet] = [found for found in sets if found is not None]
    real = told(find_set, Path(options.real).expanduser(), REAL) if options.real else None
    for method in methods if real is not None else []:
        told(check_identities, method, real)
    paths = [path for pictures in (*methods, *([real] if real is not None else [])) for path in pictures.paths]
    for path in tqdm(paths, desc="Looking at the pictures", unit="", leave=False, disable=not paths):
        told(visible_picture, path)
    judged, asked = options.features == "judge", options.clip is not None
    prompts = {method.name: told(prompts_of, method, options.trigger) if asked else None for method in methods}
    wishes = {method.name: told(wishes_of, method) if judged else None for method in methods}
    known = told(attributes_of, real) if judged and real is not None else None
    if problems or real is None:
        raise PersonalizeError("\n".join(dict.fromkeys(problems)))
    said = {name: texts or [] for name, texts in prompts.items()}
    return Material(methods, real, said, {name: wish or [] for name, wish in wishes.items()}, known or {})


def _options(options: Evaluation, read_too: Sequence[Path] = ()) -> None:
    """Raises PersonalizeError, a line for each problem; `read_too` are folders of pictures beside those of the options."""
    needed = {
        "generated": (options.generated, "the folder with generated pictures"),
        "real": (options.real, "the folder with real pictures"),
        "output_dir": (options.output_dir, "the folder for the results"),
    }
    problems = [f"--{name} is missing: {what}." for name, (value, what) in needed.items() if not value]

    told = partial(tell, problems)
    if 0 < options.bootstrap_draws < LEAST_DRAWS:
        problems.append(
            f"--bootstrap_draws {options.bootstrap_draws} are too few for an interval: give {LEAST_DRAWS} or more, or 0 for "
            "none."
        )
    resolved = [Path(folder).expanduser().resolve() for folder in options.generated]
    problems += [
        f"--generated {folder} is given twice." for folder in dict.fromkeys(resolved) if resolved.count(folder) > 1
    ]
    read = [*resolved, *([Path(options.real).expanduser().resolve()] if options.real else [])]
    read += [folder.expanduser().resolve() for folder in read_too]
    written = {
        name: Path(folder).expanduser().resolve()
        for name, folder in (("output_dir", options.output_dir), ("cache_dir", options.cache_dir))
        if folder
    }
    inside = [
        f"--{name} {folder} is in {around}, whose pictures are read: give a folder outside of it."
        for name, folder in written.items()
        for around in [one for one in read if folder.is_relative_to(one)][:1]
    ]
    problems += inside
    for name, folder in written.items() if not inside else ():
        told(check_writable, folder, f"--{name}")
    if options.features == "inception":
        told(features.check_torch_fidelity)
        if not options.inception_weights:
            problems.append(
                "--features inception needs --inception_weights: torch-fidelity's weights-inception-2015-12-05-6726825d.pth, "
                "or download to fetch it now."
            )
        elif options.inception_weights != features.DOWNLOAD:
            told(features.check_inception, Path(options.inception_weights).expanduser())
    elif options.inception_weights:
        problems.append(
            "--inception_weights is for --features inception, but --features is judge: give both or neither."
        )
    if options.clip and options.clip != "pocket":
        told(features.check_model, options.clip, "--clip", ("clip",))
    if options.trigger is not None and not options.clip:
        problems.append("--trigger would do nothing without --clip, which reads the prompts: give both or neither.")
    if options.dino:
        told(features.check_model, options.dino, "--dino", features.VIT_TYPES)
    if problems:
        raise PersonalizeError("\n".join(problems))


def _view(options: Evaluation, material: Material, cache: Cache) -> tuple[list[Views], Views]:
    """All sets by all networks, one network after the other."""
    size = options.batch_size
    if options.features == "judge":
        main = features.judge(cache, size)
    else:
        main = features.inception(options.inception_weights or "", cache, size)
    clip = features.clip(options.clip, cache, size) if options.clip else None
    dino = features.dino(options.dino, cache, size) if options.dino else None
    sets = [*material.methods, material.real]
    mains = [main.pictures(pictures.paths, pictures.name) for pictures in sets]
    clips = [clip.pictures(s.paths, s.name)["features"] if clip else None for s in sets]
    texts = [_texts(clip, material.prompts.get(pictures.name, [])) for pictures in sets]
    dinos = [dino.pictures(s.paths, s.name)["features"] if dino else None for s in sets]
    wishes = [material.wishes.get(pictures.name, []) for pictures in sets]
    views = [Views(*parts) for parts in zip(sets, mains, clips, texts, dinos, wishes, strict=True)]
    return views[:-1], views[-1]


def _texts(clip: features.Extractor | None, prompts: Sequence[str]) -> Tensor | None:
    """[n, d], NaN for pictures without a prompt; None if there is none at all."""
    unique = sorted(set(prompts) - {""})
    if clip is None or not unique:
        return None
    rows = clip.texts(unique)
    rows = torch.cat([rows, torch.full_like(rows[:1], torch.nan)])
    places = {text: i for i, text in enumerate(unique)}
    return rows[[places.get(text, len(unique)) for text in prompts]]


def _write(result: Mapping[str, Any], figures: Mapping[str, Mapping[str, Figure]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figures.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = _table(result)
    (folder / "table.md").write_text(text, encoding="utf-8")
    for name, kind in KINDS.items():
        marks = {
            method: Mark(found[name].estimate.value, found[name].estimate.interval)
            for method, found in figures.items()
            if name in found
        }
        if marks:
            title = kind.title + (f" ({kind.better} is better)" if kind.better else "")
            bar_plot(folder / f"{name}.png", title, marks, pale=[REAL])
    print(text)
    print(f"{folder / 'table.md'}, figures.json, and a picture of each figure")


def _table(result: Mapping[str, Any]) -> str:
    """Markdown: figures by method, differences, what they mean, remarks."""
    figures = result["figures"]
    names = [name for name in KINDS if any(name in found for found in figures.values())]
    arrows = {"higher": " ↑", "lower": " ↓", "": ""}
    header = [KINDS[name].title + arrows[KINDS[name].better] for name in names]
    rows = [[method, *(_cell(found.get(name)) for name in names)] for method, found in figures.items()]
    parts = [_grid(["", *header], rows)]
    pairs = dict.fromkeys((d["of"], d["against"]) for d in result["differences"])
    if pairs:
        found = {(d["of"], d["against"], d["figure"]): d for d in result["differences"]}
        rows = [[f"{a} - {b}", *(_difference(found.get((a, b, name))) for name in names)] for a, b in pairs]
        parts.append("Differences over the same identities; * where the interval leaves out zero:")
        parts.append(_grid(["", *header], rows))
    if any(figure["low"] is not None for found in figures.values() for figure in found.values()):
        parts.append("In brackets: 95 % intervals, by drawing identities again.")
    parts.append("\n".join(f"- {KINDS[name].title}: {KINDS[name].meaning}." for name in names))
    if result["remarks"]:
        parts.append("\n".join(f"- {remark}" for remark in result["remarks"]))
    return "\n\n".join(parts) + "\n"


def _cell(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return ""
    around = "" if figure["low"] is None else f" [{number(figure['low'])}, {number(figure['high'])}]"
    return number(figure["value"]) + around


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    low, high = number(found["low"]), number(found["high"])
    return f"{number(found['difference'])} [{low}, {high}]{' *' if found['apart'] else ''}"


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    cells = [[cell.replace("|", "/") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
