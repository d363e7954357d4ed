"""The table: which way of bringing several photographs together is best, beside the methods that train for each subject.

    python -m training.benchmark --preset pocket --output_dir FOLDER
    python -m training.benchmark --preset lfw --output_dir FOLDER --data lfw --base v1-5-pruned-emaonly.safetensors \\
        --image_encoder CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors --ip_adapter ip-adapter_sd15.safetensors \\
        --inception_weights weights-inception-2015-12-05-6726825d.pth

Four IP-Adapters that were trained alike, from the same start and for as many steps, but for how they make one image
prompt of several references: from one reference, max pooling, average pooling, self-attention, which stands over the
tokens and has a loss of its own beside the noise's. Each draws identities that
no training saw, with the same prompts and noise. For some of the identities DreamBooth, LoRA, Textual Inversion and Custom
Diffusion are trained, too. The pocket preset takes adapters that come with the pack, or trains them where there are none, or with
--train. Beside its methods stand what the generator itself draws of the identities, and the same with everybody under
another's name. Everything is kept in the folder: stopped at any moment, the same command goes on. Several processes, as
training has them, share the work; together they train with as many times the batch. report/index.html has the tables,
plots and pictures.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from accelerate import Accelerator

from . import features
from .adapter_checks import check_files
from .base_checks import check_size, family_at
from .base_model import OFFLINE, size_step_of
from .benchmark_data import FIRST_OF_TRAINING, TRAIN_IDENTITIES, Material, pocket_material, real_material
from .benchmark_stages import draw_adapters, draw_numbers, draw_tuned, find_adapters, measure_all
from .evaluate import LEAST_DRAWS
from .look import alone, check_same, check_writable, remember, tell
from .options import option
from .report import write_report
from .settings import exit_status, make_groups, read_values
from .shared import POCKET, PersonalizeError, title_of

TUNED_IDENTITIES = 4  # by default
ANYWAY = ("output_dir", "batch_size", "bootstrap_draws")
"""Settings with which a benchmark may go on otherwise than it began."""


@dataclass
class Benchmark:
    """Benchmark"""

    preset: str = option("pocket", "drawn portraits on the pocket model, or photographs of people", ("pocket", "lfw"))
    output_dir: str | None = option(None, "folder for everything that is trained, drawn and measured, and the report")
    base: str | None = option(None, "lfw: the base model, a file, folder or hub id")
    data: str | None = option(None, "lfw: a folder for each person, name/name_0001.jpg")
    image_encoder: str | None = option(None, "lfw: the CLIP image encoder of the adapter")
    ip_adapter: str | None = option(
        None, "the adapter that all start from; pocket has one, lfw starts from scratch without"
    )
    inception_weights: str | None = option(None, "lfw: torch-fidelity's Inception, for FID and IS")
    clip: str | None = option(None, "lfw: a CLIP for CLIP-I and CLIP-T, a folder or hub id")
    dino: str | None = option(None, "lfw: a ViT for DINO, a folder or hub id")
    identities: int = option(50, "held-out identities to draw", least=1)
    seeds: int = option(5, "pictures of each identity and prompt", least=1)
    references: int = option(10, "references of each identity, at most", least=1)
    tuned_identities: int | None = option(
        None,
        "identities that DreamBooth, LoRA, Textual Inversion and Custom Diffusion are trained for; 4, or all",
        least=0,
    )
    tuned_steps: int | None = option(None, "steps of each of those trainings; each method's own by default", least=1)
    train: bool = option(False, "pocket: train the four adapters, too, instead of taking those that come with the pack")
    train_identities: int | None = option(
        None, "pocket, with --train: identities to train on; 2000 by default", least=2
    )
    max_train_steps: int | None = option(None, "of each adapter; 1500 for pocket, 20000 for lfw", least=1)
    train_batch_size: int | None = option(None, "32 for pocket, 8 for lfw", least=1)
    resolution: int | None = option(None, "pixels; 64 for pocket, 512 for lfw", least=16)
    weight: float = option(1.0, "λ of the adapters", least=0)
    batch_size: int | None = option(None, "pictures drawn at once; 50 for pocket, 4 for lfw", least=1)
    bootstrap_draws: int = option(1000, "how often identities are drawn for the intervals", least=LEAST_DRAWS)


def main(arguments: list[str] | None = None) -> int:
    """What `python -m training.benchmark` does; returns the exit status: 1 if something is wrong, and was said."""

    def work() -> None:
        given, values = read_values((Benchmark,), "python -m training.benchmark", __doc__ or "", arguments)
        benchmark(*make_groups((Benchmark,), {**values, **given}))

    return exit_status(work)


def check(options: Benchmark) -> None:
    """Raises PersonalizeError, a line for each option that is missing or cannot be used."""
    problems = list[str]()
    if not options.output_dir:
        problems.append("--output_dir is missing: the folder for everything that is trained, drawn and measured.")
    else:
        tell(problems, check_writable, Path(options.output_dir).expanduser(), "--output_dir")
    own = ("base", "data", "image_encoder", "inception_weights")
    if options.preset == "lfw":
        problems += [f"--preset lfw needs --{name}." for name in own if getattr(options, name) is None]
        given = [name for name in ("train", "train_identities") if getattr(options, name)]
        problems += [
            f"--{name} is for --preset pocket: lfw always trains, on all who are not held out." for name in given
        ]
    else:
        given = [name for name in (*own, "clip", "dino") if getattr(options, name) is not None]
        problems += [f"--{name} is for --preset lfw: the pocket preset brings its own." for name in given]
        trains = ("ip_adapter", "max_train_steps", "train_batch_size", "train_identities")
        problems += [
            f"--{name} is for training, and the adapters that come with the pack are taken: give --train, too."
            for name in trains
            if getattr(options, name) is not None and not options.train
        ]
        if options.identities > FIRST_OF_TRAINING:
            problems.append(
                f"--identities {options.identities}: at most {FIRST_OF_TRAINING}, as those that follow are trained on."
            )
    if (options.tuned_identities or 0) > options.identities:
        problems.append(
            f"--tuned_identities {options.tuned_identities} are more than the {options.identities} that are drawn."
        )
    if options.tuned_steps is not None and options.tuned_identities == 0:
        problems.append("--tuned_steps has no effect with --tuned_identities 0: give one of them.")
    family = tell(problems, family_at, options.base) if options.preset == "lfw" else "pocket"
    if options.resolution is not None and family in OFFLINE:
        tell(problems, check_size, options.resolution, size_step_of(family), title_of(family))
    for check_one, arguments in _networks(options, family):
        tell(problems, check_one, *arguments)
    if problems:
        raise PersonalizeError("\n".join(problems))


def _networks(options: Benchmark, family: str | None) -> list[tuple[Callable, tuple]]:
    """Checks of what adapters are trained from, and of what measures, which is not used before all is trained and drawn."""
    if options.preset != "lfw":
        return []
    checks: list[tuple[Callable, tuple]] = [(features.check_torch_fidelity, ())]
    if options.image_encoder:
        checks.append((check_files, (options.ip_adapter, options.image_encoder, family)))
    if options.inception_weights and options.inception_weights != features.DOWNLOAD:
        checks.append((features.check_inception, (Path(options.inception_weights).expanduser(),)))
    if options.clip:
        checks.append((features.check_model, (options.clip, "--clip", ("clip",))))
    if options.dino:
        checks.append((features.check_model, (options.dino, "--dino", features.VIT_TYPES)))
    return checks


def benchmark(options: Benchmark) -> Path:
    """All stages; returns the report.

    Raises:
        PersonalizeError: whatever the user can mend.
        OSError: a file cannot be written.
    """
    check(options)
    folder, tuned = Path(options.output_dir or ".").expanduser(), options.tuned_identities
    options = replace(
        options,
        tuned_identities=min(TUNED_IDENTITIES, options.identities) if tuned is None else tuned,
        train_identities=options.train_identities or TRAIN_IDENTITIES,
    )
    with alone(folder):
        return _benchmark(options, folder)


def _benchmark(options: Benchmark, folder: Path) -> Path:
    accelerator = Accelerator(mixed_precision="no")
    if accelerator.is_main_process:
        now = {name: value for name, value in asdict(options).items() if name not in ANYWAY}
        note, option = folder / "settings.json", "--output_dir"
        check_same(note, now, f"The benchmark in {folder} was begun", option)
        remember(note, now, option)
    with accelerator.main_process_first():  # it writes the pictures, the others find them
        material: Material = (
            pocket_material(options, folder) if options.preset == "pocket" else real_material(options, folder)
        )
    adapters = find_adapters(accelerator, options, material, folder, POCKET / "ipadapter")
    draw_adapters(accelerator, options, material, adapters, folder)
    draw_numbers(accelerator, options, material, adapters, folder)
    draw_tuned(accelerator, options, material, folder)
    accelerator.end_training()
    report = folder / "report" / "index.html"
    if accelerator.is_main_process:
        measured = measure_all(options, material, folder)
        write_report(report, options, material, measured, folder)
        print(report)
    return report


if __name__ == "__main__":
    sys.exit(main())
