"""Pictures to be measured, drawn first: by a base model with a personalisation file, of the same prompts for everybody."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from .adapter_checks import check_files, with_self_attention
from .base_checks import check_size, family_at
from .base_model import OFFLINE, load_base, size_step_of
from .dataset import fill_in
from .defaults import RESOLUTIONS
from .following import ATTEND_AND_EXCITE, COMPOSABLE_DIFFUSION, PLAIN, PROMPT_METHODS, excited_places
from .generate import Job, ReferencePrompts, Sampling, draw_pictures, noise_seed
from .image_encoder import load_image_encoder
from .look import check_same, remember, tell
from .options import AGGREGATION_CHOICES, option
from .personalization import FILES, check_file, put_on
from .picture_sets import find_set
from .shared import (
    BEFORE_PROJECTION,
    SELF_ATTENTION,
    TRIGGER,
    IPAdapter,
    PersonalizeError,
    parse_concepts,
    parse_words,
    plural,
    read_ip_adapter,
    title_of,
)


@dataclass
class Drawing:
    """Drawing the pictures first"""

    pretrained_model_name_or_path: str | None = option(
        None, "draw with this base model, or DreamBooth's result: a file, a diffusers folder, or a hub id"
    )
    ip_adapter: str | None = option(None, "with this IP-Adapter")
    image_encoder: str | None = option(None, "its CLIP image encoder: a file, a folder, or a hub id")
    references: str | None = option(
        None, "the adapter's reference pictures, by identity if the real ones are; the real ones by default"
    )
    max_references: int | None = option(None, "references of each identity at most", least=1)
    aggregation: str = option(SELF_ATTENTION, "how several become one", AGGREGATION_CHOICES)
    weight: float = option(1.0, "λ of the adapter")
    lora: str | None = option(None, "with this LoRA")
    textual_inversion: str | None = option(None, "with this learned word, which prompts call by {trigger}")
    custom_diffusion: str | None = option(
        None,
        "with this Custom Diffusion, whose words lie beside it: prompts call a single concept by {trigger}; of several the "
        "one whose trigger --word is, the others by embedding:NAME as in ComfyUI",
    )
    word: str = option(TRIGGER, "what {trigger} in the prompts is")
    class_name: str = option("person", "what {class} in the prompts is")
    prompt: list[str] = option(  # noqa: RUF009 - a list of its own for each
        [], "draw this; may be given several times, with {trigger} and {class}"
    )
    prompt_method: str = option(
        PLAIN,
        "how a prompt guides: as it is; with the words of --excite (Attend-and-Excite); as concepts joined by AND and NOT "
        "(Composable Diffusion)",
        PROMPT_METHODS,
    )
    excite: list[str] = option(  # noqa: RUF009 - a list of its own for each
        [], 'the words that must show: cat, "yellow bowl"; once for all prompts, or once for each in their order'
    )
    pictures_per_prompt: int = option(4, "of each prompt and identity", least=1)
    resolution: int | None = option(None, "pixels, of a square; what suits the base by default", least=16)
    num_inference_steps: int = option(20, "of Euler's method", least=1)
    guidance_scale: float = option(5.0, "towards the prompt", least=0)
    draw_batch_size: int = option(4, "pictures drawn at once", least=1)
    name: str = option("drawn", "what the table calls them")


def check_drawing(drawing: Drawing) -> None:
    """Raises PersonalizeError, a line for each problem that can be told without loading a model."""
    problems = list[str]()
    told = partial(tell, problems)
    family = told(family_at, drawing.pretrained_model_name_or_path)
    if not drawing.prompt:
        problems.append("--prompt is missing: what to draw.")
    problems += _prompt_problems(drawing) + _idle_problems(drawing)
    if drawing.ip_adapter is not None:
        told(_check_adapter, drawing, family)
    if drawing.references is not None:
        told(find_set, Path(drawing.references).expanduser(), "references")
    for method, path in _files(drawing).items():
        told(check_file, method, path)
    if drawing.textual_inversion is not None and drawing.custom_diffusion is not None:
        problems.append("--textual_inversion and --custom_diffusion both say what {trigger} is: give one of them.")
    if drawing.resolution is not None and family in OFFLINE:
        told(check_size, drawing.resolution, size_step_of(family or ""), title_of(family or ""))
    if drawing.name.strip() in ("", ".", "..") or any(letter in drawing.name for letter in "/\\\0"):
        problems.append(f"--name {drawing.name!r} is no name for a folder.")
    if problems:
        raise PersonalizeError("\n".join(problems))


def check_no_drawing(drawing: Drawing) -> None:
    """Raises PersonalizeError where there is no base to draw with, but something that is to be drawn."""
    if given := _given(drawing, *(f.name for f in fields(drawing))):
        raise PersonalizeError(f"{given} would draw nothing: give --pretrained_model_name_or_path, too.")


def _given(drawing: Drawing, *names: str) -> str:
    plain = Drawing()
    return " and ".join(f"--{name}" for name in names if getattr(drawing, name) != getattr(plain, name))


def _idle_problems(drawing: Drawing) -> list[str]:
    """A sentence for each option that would do nothing."""
    problems, texts = [], " ".join([*drawing.prompt, *drawing.excite])
    learned = _files(drawing).keys() - {"lora"}  # who calls its word by --word
    own = ("image_encoder", "references", "max_references", "aggregation", "weight")
    if drawing.ip_adapter is None and (given := _given(drawing, *own)):
        problems.append(f"{given} would do nothing without --ip_adapter: give both or neither.")
    if not drawing.prompt:
        return problems
    if drawing.textual_inversion is not None and "{trigger}" not in texts and drawing.word not in texts:
        problems.append("--textual_inversion would do nothing: write {trigger} into a --prompt.")
    elif _given(drawing, "word") and "{trigger}" not in texts and not (learned and drawing.word in texts):
        problems.append("--word would do nothing: write {trigger}, for which it stands, into a --prompt.")
    if _given(drawing, "class_name") and "{class}" not in texts:
        problems.append("--class_name would do nothing: write {class}, for which it stands, into a --prompt.")
    return problems


def _check_adapter(drawing: Drawing, family: str | None) -> None:
    check_files(drawing.ip_adapter, drawing.image_encoder, family)
    path = Path(drawing.ip_adapter or "").expanduser()
    if drawing.aggregation == SELF_ATTENTION and with_self_attention(path) is None:
        raise PersonalizeError(
            f"{path.name} has no self-attention over the references: use --aggregation concatenate, average or max."
        )


def _files(drawing: Drawing) -> dict[str, Path]:
    """What is put on the base, by method."""
    given = {method: getattr(drawing, method) for method in FILES}
    return {method: Path(where).expanduser() for method, where in given.items() if where is not None}


def _prompt_problems(drawing: Drawing) -> list[str]:
    excites = drawing.prompt_method == ATTEND_AND_EXCITE
    if excites and not drawing.excite:
        return ["--excite is missing: the words that must show, for example --excite 'cat, \"yellow bowl\"'."]
    if drawing.excite and not excites:
        return [f"--excite is for --prompt_method {ATTEND_AND_EXCITE}, not {drawing.prompt_method}."]
    if len(drawing.excite) > 1 and len(drawing.excite) != len(drawing.prompt):
        return [
            f"--excite is given {len(drawing.excite)} times for {plural(len(drawing.prompt), 'prompt')}: give it "
            f"once, or once for each."
        ]
    problems = []
    readings: list[tuple[Callable, list[str]]] = [(parse_words, drawing.excite)]
    if drawing.prompt_method == COMPOSABLE_DIFFUSION:
        readings.append((parse_concepts, drawing.prompt))
    for read, texts in readings:
        for text in texts:
            try:
                read(text)
            except PersonalizeError as error:
                problems.append(str(error))
    return problems


def draw_first(drawing: Drawing, real: Path, output: Path, seed: int) -> Path:
    """Draw what is not there yet, in all processes; returns the folder.

    Args:
        drawing: what and with what.
        real: the real pictures, whose identities are drawn.
        output: the folder gets a place in it.
        seed: of the first picture of every prompt.

    Raises:
        PersonalizeError: the files do not fit together.
    """
    accelerator = Accelerator()
    folder = output / "drawn" / drawing.name
    dtype = torch.float16 if accelerator.device.type == "cuda" else torch.float32
    base = load_base(drawing.pretrained_model_name_or_path or "", dtype)
    for method, path in _files(drawing).items():
        put_on(base, method, path, drawing.word)
    base.pipeline.to(accelerator.device)
    base.pipeline.unet.requires_grad_(False)
    resolution = drawing.resolution or RESOLUTIONS.get(base.family, 512)
    check_size(resolution, base.size_step, base.name)
    people = find_set(real, "real").identities
    given = find_set(Path(drawing.references).expanduser(), "references").identities if drawing.references else people
    if missing := [name for name in people if name not in given] if drawing.ip_adapter is not None else []:
        raise PersonalizeError(
            f"{drawing.references} has no pictures of {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}, whom "
            f"{real} shows: add them, or use the same names."
        )
    showing = None
    if drawing.ip_adapter is not None:
        adapter = IPAdapter.from_state(read_ip_adapter(Path(drawing.ip_adapter).expanduser()))
        encoder = load_image_encoder(drawing.image_encoder or "").to(accelerator.device)
        showing = ReferencePrompts(base, adapter, encoder, drawing.aggregation, BEFORE_PROJECTION, drawing.weight)
    excite = drawing.excite if len(drawing.excite) > 1 else (drawing.excite or [""]) * len(drawing.prompt)
    jobs = [
        Job(
            folder / name / f"p{i:02}-s{number}.png",
            fill_in(prompt, drawing.word, drawing.class_name),
            noise_seed(seed + number, i),
            given.get(name, ())[: drawing.max_references],
            excite=fill_in(excite[i], drawing.word, drawing.class_name),
        )
        for name in people
        for i, prompt in enumerate(drawing.prompt)
        for number in range(drawing.pictures_per_prompt)
    ]
    if drawing.prompt_method == ATTEND_AND_EXCITE:
        for text, words in dict.fromkeys((job.prompt, job.excite) for job in jobs):
            excited_places(base, text, words)  # before the first is drawn
    sampling = Sampling(
        resolution,
        drawing.num_inference_steps,
        drawing.guidance_scale,
        drawing.draw_batch_size,
        prompts=drawing.prompt_method,
    )
    if accelerator.is_main_process:
        now = {name: value for name, value in asdict(drawing).items() if name not in ("name", "draw_batch_size")}
        now, note = now | {"seed": seed}, folder.with_name(f"{drawing.name}.json")
        check_same(note, now, f"The pictures in {folder} were drawn", "--name")
        remember(note, now, "--name")
    draw_pictures(accelerator, base, jobs, sampling, f"Drawing {drawing.name}", showing)
    return folder
