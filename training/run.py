"""From options to a file: what every fine-tuning method does alike."""

import gc
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import set_seed
from tqdm import tqdm

from .about import about, digest_of_file, told
from .base_checks import check_family, check_size
from .base_model import BaseModel, load_base
from .checkpoint import checkpoints_in, find_checkpoint, read_settings_of, set_aside
from .custom_diffusion import CustomDiffusionMethod
from .dataset import Example, Order, Sizes, fill_in
from .defaults import fill_defaults, hints
from .dreambooth import DreamBoothMethod
from .encoding import Cache, Latent, TextStates, digest_of, encode_captions, encode_pictures, latent_key
from .going_on import changed_settings, processes, shared_settings
from .identities import Held, find_sets
from .ip_adapter import IPAdapterMethod
from .look import alone
from .loop import Trainer
from .lora import LoraMethod
from .methods import PRECISIONS, Method
from .options import CustomDiffusion, DreamBooth, IPAdapter, Lora, SubjectDiffusion, TextualInversion
from .preflight import check_steps, preflight
from .record import Record
from .settings import Settings, read_settings, save_settings
from .shared import PersonalizeError, plural
from .stopping import Stop, StoppedError, step_of, stopping_on_signals
from .subject_data import SubjectPicture
from .subject_diffusion import SubjectDiffusionMethod, find_subjects
from .subjects import find_pictures
from .textual_inversion import TextualInversionMethod
from .watch import STEPS, draw_samples, read_rows, resting, validation_loss, views, write_samples

T = TypeVar("T")
R = TypeVar("R")

METHODS: dict[str, tuple[type, Callable[[BaseModel, Settings], Method]]] = {
    "lora": (Lora, LoraMethod),
    "textual_inversion": (TextualInversion, TextualInversionMethod),
    "dreambooth": (DreamBooth, DreamBoothMethod),
    "custom_diffusion": (CustomDiffusion, CustomDiffusionMethod),
    "ip_adapter": (IPAdapter, IPAdapterMethod),
    "subject_diffusion": (SubjectDiffusion, SubjectDiffusionMethod),
}


def main(method: str, doc: str | None, arguments: list[str] | None = None) -> int:
    """What `python -m training.<method>` does; returns the exit status.

    0: the result is written. 1: something is wrong, and was said. 128 + n: stopped by signal n, with a checkpoint.
    """
    try:
        options, prog = METHODS[method][0], f"python -m training.{method}"
        settings = read_settings(options, prog, doc or "", arguments, hints(method))
        stop = Stop()
        with stopping_on_signals(stop):
            paths = train(method, settings, stop)
            PartialState().destroy_process_group()
    except PersonalizeError as error:
        print(error, file=sys.stderr)
        return 1
    if not paths:
        return 128 + (stop.signal or 0)
    for path in filter(Path.is_file, paths):  # other processes have the folder
        print(told(path))
    return 0


def train(
    method: str, settings: Settings, stop: Stop | None = None, report: Callable[[int, int], None] | None = None
) -> list[Path]:
    """`personalize` in a folder that no other training uses; what goes wrong with memory and disk is a sentence, too."""
    with explained(settings.folder), alone(settings.folder if settings.output.output_dir else None):
        try:
            return personalize(method, settings, stop, report)
        except StoppedError:
            print("Stopped before the first step. The same command uses again what was encoded and drawn so far.")
            return []


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """A full disk, or memory that is not enough, in one sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise PersonalizeError(
            "There is not enough memory for the base model: use --mixed_precision bf16, or a lower --resolution."
        ) from None
    except OSError as error:
        goes_on = "it goes on from the last checkpoint" if checkpoints_in(folder / "checkpoints") else "it starts anew"
        raise PersonalizeError(
            f"{error.filename or folder} cannot be read or written ({error.strerror or error}): mend that and run the same "
            f"command again; {goes_on}."
        ) from None


def personalize(
    method: str, settings: Settings, stop: Stop | None = None, report: Callable[[int, int], None] | None = None
) -> list[Path]:
    """Train and write the result.

    Args:
        method: a key of METHODS.
        settings: what the user said.
        stop: asks the loop to stop.
        report: is told after each step how many are done, of how many.

    Returns:
        The files; none if it was stopped. Of several processes the main one writes them, when the others have returned.

    Raises:
        PersonalizeError: whatever the user can mend.
        OSError: a file cannot be written.
    """
    findings = preflight(settings, quiet=int(os.environ.get("LOCAL_RANK", "0")) > 0)
    for warning in findings.warnings:
        print(warning, file=sys.stderr)
    given, settings = settings, fill_defaults(settings, findings.family or "sd15")
    accelerator = start(settings)
    if accelerator.num_processes != processes():
        raise PersonalizeError(
            f"{processes()} processes were started, but they do not train together: start them with accelerate launch, or "
            "on CPUs with ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -m training..."
        )
    dtype = PRECISIONS[{"no": "fp32"}.get(precision := settings.training.mixed_precision or "no", precision)]
    options = settings.base
    base = load_base(
        options.pretrained_model_name_or_path or "",
        torch.float32 if method == "dreambooth" else dtype,
        options.prediction_type,
        options.revision,
        options.variant,
        options.vae_path,
    )
    if findings.family is None:
        check_family(settings, base.family)
        settings = fill_defaults(given, base.family)
    if settings.training.channels_last:
        base.pipeline.unet.to(memory_format=torch.channels_last)
    base.pipeline.to(accelerator.device)
    mark, digest = base.fingerprint(), digest_of_file(base)
    checkpoint = find_checkpoint(settings.folder / "checkpoints", settings.watching.resume_from_checkpoint)
    if checkpoint is not None and findings.family is None and (problems := changed_settings(settings, checkpoint)):
        raise PersonalizeError("\n".join(problems))
    begun = 0 if checkpoint is None else read_settings_of(checkpoint)[0]
    record = Record(settings.folder, begun, accelerator)
    vae = digest_of(base.pipeline.vae)
    trainer = prepare(method, settings, accelerator, base, record, Stop() if stop is None else stop, vae)
    trainer.report = report or trainer.report
    check_steps(settings, trainer.steps)  # of epochs, or of a hub id, which the preflight could not tell
    material = material_of(trainer.examples, mark, vae)
    if trainer.method.conditioning is not None:
        material |= trainer.method.conditioning.material
    if checkpoint is not None:
        if problems := changed_settings(settings, checkpoint, material):
            raise PersonalizeError("\n".join(problems))
        trainer.load(checkpoint)
        accelerator.print(f"Going on after step {begun}, from {checkpoint}.")
    accelerator.wait_for_everyone()  # all have read what one now changes
    if accelerator.is_main_process:
        set_aside(settings.folder / "checkpoints", begun)
        save_settings(settings, settings.folder / "config.toml")
        record.begin()
    done = trainer.run(begun, shared_settings(settings) | material)
    if accelerator.is_main_process:
        trainer.record.draw(settings.folder / "loss.png")
    for tracker in accelerator.trackers:
        tracker.finish()
    if done < trainer.steps:
        latest = settings.watching.resume_from_checkpoint == "latest"
        goes_on = "The same command" if latest else "The same command without --resume_from_checkpoint"
        accelerator.print(f"Stopped after step {done} of {trainer.steps}. {goes_on} goes on from there.")
        return []
    if not accelerator.is_main_process:
        return [settings.folder]
    if trainer.average is not None:
        trainer.average.copy_to(trainer.parameters)
    subject = [example for example in trainer.examples if not example.is_prior]
    facts = about(base, settings, method, subject, digest, mark)
    return trainer.method.write(settings.folder, settings.output.output_name or "result", facts)


def start(settings: Settings) -> Accelerator:
    """The processes, their device and precision."""
    if settings.training.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    tracker = settings.watching.report_to
    AcceleratorState._reset_state(processes() == 1)  # of what came before; processes that are together stay so
    accelerator = Accelerator(
        mixed_precision=settings.training.mixed_precision,
        log_with=None if tracker == "none" else tracker,
        project_dir=settings.folder,
    )
    if tracker != "none":
        accelerator.init_trackers("personalize")
    set_seed(settings.training.seed)
    return accelerator


def prepare(
    method: str, settings: Settings, accelerator: Accelerator, base: BaseModel, record: Record, stop: Stop, vae: str
) -> Trainer:
    """Find and encode pictures and captions, attach the method, free what is not needed any more.

    Args:
        vae: the digest of its weights; the others as Trainer has them.
    """
    data, watching = settings.data, settings.watching
    sizes = Sizes(settings.resolution, base.size_step, data.buckets)
    check_size(sizes.resolution, base.size_step, base.name)  # of a hub id, which the preflight could not tell
    held: Held = {}
    sets: dict[Path, tuple[Path, ...]] = {}
    subjects: dict[Path, SubjectPicture] = {}
    if isinstance(settings.method, IPAdapter):
        examples, kept_out, sets, held = find_sets(settings, sizes)
    elif isinstance(settings.method, SubjectDiffusion):
        examples, kept_out, subjects, held = find_subjects(settings, sizes)
    else:
        examples, kept_out = find_pictures(settings, sizes, accelerator, base, stop)
    cache = Cache(Path(data.cache_dir).expanduser() if data.cache_dir else settings.folder / "cache")
    latents = _latents(accelerator, base, [*examples, *kept_out], cache, vae, stop)
    prompts = [fill_in(prompt, data.trigger, data.class_name) for prompt in watching.drawn_prompts]
    captions = list(dict.fromkeys(["", *prompts, *(c for e in (*examples, *kept_out) for c in e.captions)]))
    digests = "-".join(digest_of(encoder) for encoder in base.text_encoders)
    made = METHODS[method][1](base, settings)
    if isinstance(made, IPAdapterMethod):
        paths = [path for pictures in sets.values() for path in pictures]
        shared_work(accelerator, paths, "Seeing", stop, lambda some: made.see(some, cache))
        made.begin(sets)
    if isinstance(made, SubjectDiffusionMethod):
        shared_work(accelerator, list(subjects.values()), "Seeing", stop, lambda some: made.see(some, cache))
        made.begin(subjects, {example.path: example.size for example in (*examples, *kept_out)})
    if (long := too_long(base, made, examples)) and accelerator.is_main_process:
        print(
            f"{plural(len(long), 'caption is', 'captions are')} longer than the "
            f"{base.pipeline.tokenizer.model_max_length} tokens that are read "
            f"({', '.join(long[:3])}{', ...' if len(long) > 3 else ''}): their end is left out.",
            file=sys.stderr,
        )
    texts: dict[str, TextStates] = {}
    if not made.trains_text:
        bar = tqdm(captions, desc="Captions", unit="", disable=not accelerator.is_local_main_process, leave=False)
        with resting(base):
            texts = encode_captions(base, stop.between(bar), cache, digests, settings.base.clip_skip)
    _put_away(base, made, samples=bool(prompts))
    if settings.training.gradient_checkpointing:
        base.pipeline.unet.enable_gradient_checkpointing()
        for encoder in base.text_encoders if made.trains_text else []:
            enable = getattr(encoder, "activation_checkpointing_enable", None) or encoder.gradient_checkpointing_enable
            enable()  # the one is its name in transformers 6
    base.pipeline.unet.train()
    for encoder in base.text_encoders if made.trains_text else []:
        encoder.train()
    order = Order(examples, settings.training.train_batch_size * accelerator.num_processes, settings.training.seed)
    trainer = Trainer(
        accelerator,
        base,
        made,
        settings,
        examples,
        latents,
        texts,
        order,
        record,
        lambda _: None,
        stop,
    )
    trainer.watch = _watch(trainer, prompts, kept_out, held)
    return trainer


def too_long(base: BaseModel, method: Method, examples: list[Example]) -> list[str]:
    """The names of pictures of whose captions the text encoder does not read the end."""
    tokenizer = base.pipeline.tokenizer

    def tokens(caption: str) -> int:
        return len(tokenizer(method.spoken(caption), verbose=False).input_ids)

    return [
        example.path.name
        for example in dict.fromkeys(examples)
        if any(tokens(caption) > tokenizer.model_max_length for caption in example.captions)
    ]


def _put_away(base: BaseModel, method: Method, samples: bool) -> None:
    """What the training does not need: out of memory, or to the CPU where it is needed later. diffusers does without."""
    text = [] if method.trains_text else ["text_encoder", "text_encoder_2"]
    for name in (*text, "vae"):
        later = method.writes_all or (name == "vae" and samples)
        if getattr(base.pipeline, name, None) is not None:
            setattr(base.pipeline, name, getattr(base.pipeline, name).to("cpu") if later else None)
    gc.collect()  # networks refer to themselves
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def material_of(examples: Sequence[Example], mark: str, vae: str) -> dict[str, str]:
    """Digests of what is trained, and on what: a run that goes on must have the same."""
    keys = {example: latent_key(example, vae) for example in dict.fromkeys(examples)}
    listed = [(keys[example], example.captions, example.is_prior) for example in examples]
    pictures = hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
    return {"base model": mark, "pictures or captions": pictures[:16]}


def _latents(
    accelerator: Accelerator, base: BaseModel, examples: list[Example], cache: Cache, digest: str, stop: Stop
) -> dict[Example, Latent]:
    def encode(some: Iterable[Example]) -> dict[Example, Latent]:
        return encode_pictures(base.pipeline.vae, some, cache, digest)

    return shared_work(accelerator, list(dict.fromkeys(examples)), "Encoding", stop, encode)


def shared_work(
    accelerator: Accelerator, things: list[T], title: str, stop: Stop, work: Callable[[Iterable[T]], R]
) -> R:
    """Each process does its part, which a cache keeps, then all go through all; with a progress bar, until asked to stop."""
    mine = things[accelerator.process_index :: accelerator.num_processes]
    bar = tqdm(mine, desc=title, unit=" pictures", disable=not accelerator.is_local_main_process, leave=False)
    done = work(stop.between(bar))
    if accelerator.num_processes == 1:
        return done
    accelerator.wait_for_everyone()
    return work(things)


def _watch(trainer: Trainer, prompts: list[str], kept_out: list[Example], held: Held) -> Callable[[int], None]:
    """The validation loss, the curve and samples, by the main process."""
    accelerator, base, settings = trainer.accelerator, trainer.base, trainer.settings
    conditioning = trainer.method.conditioning

    def rows(captions: list[str]) -> list[TextStates]:
        return read_rows(base, trainer.method, trainer.texts, captions, settings.base.clip_skip)

    def watch(step: int) -> None:
        with resting(base), accelerator.autocast():
            if kept_out:
                loss = validation_loss(
                    base,
                    trainer.scheduler,
                    kept_out,
                    trainer.latents,
                    lambda caption: rows([caption])[0],
                    accelerator.device,
                    conditioning,
                )
                trainer.record.add(step, {"validation_loss": loss})
            trainer.record.draw(settings.folder / "loss.png")
            if not prompts:
                return
            pictures, labels = [], []
            count = settings.watching.num_validation_images
            for shown in views(conditioning, held, settings.resolution):
                steps = tqdm(total=len(prompts) * count * STEPS, desc="Samples", unit=" steps", leave=False)
                with shown.around, steps:
                    drawn = draw_samples(
                        accelerator,
                        base,
                        rows([shown.said(prompt) for prompt in prompts]),
                        rows([""])[0],
                        count,
                        shown.size,
                        settings.training.seed,
                        partial(step_of, trainer.stop, steps),
                    )
                pictures += [[*shown.pictures, *row] for row in drawn]
                labels += [f"{shown.label}{shown.said(prompt)}" for prompt in prompts]
            if not pictures:
                return  # no identity is held out to draw
            sheet = write_samples(settings.folder / "samples" / f"step-{step:07}.png", pictures, labels, step)
            for tracker in accelerator.trackers:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": sheet[None]}, step=step, **layout)

    return watch
