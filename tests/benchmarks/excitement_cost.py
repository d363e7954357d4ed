"""What Attend-and-Excite costs a step of a whole SD1.5, beside diffusers' own pipeline: time and memory.

    python tests/benchmarks/excitement_cost.py [--size 512] [--steps 3] [--rounds 2] [--folder FOLDER]

One file of random weights; two words are excited, in every step, without refinement, which is only more of the same moves.
Every variant runs in a process of its own, which first samples plainly, then excited: diffusers (its pipelines without and
with Attend-and-Excite), ours headless (diffusers' plain pipeline with our callback), ours in ComfyUI, and with low_memory.
The rounds begin with another variant each. Printed are the median time of a step, without the first, and the most memory
that the process had taken until then, so that the model is in all of them.
"""

import argparse
import functools
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import COMFYUI, ROOT
from pack.training.attend_and_excite import AttendAndExcite
from pack.training.base_model import load_base
from pack.training.following import excited_places
from pack.training.shared import Excitement
from structural.full_models import random_pipeline, write_single_file

PROMPT, WORDS = "a cat and a bowl", ("cat", "bowl")
GUIDANCE = 7.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="of the square picture, pixels")
    parser.add_argument("--steps", type=int, default=3, help="that are timed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="to keep the model in; else it is deleted")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--one", choices=tuple(VARIANTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if COMFYUI is None:
        raise SystemExit("no ComfyUI found: set COMFYUI_PATH")
    if arguments.one:
        base = _base_of(arguments.folder)
        print(json.dumps(VARIANTS[arguments.one](base, arguments.size, arguments.steps)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not _base_of(folder).exists():  # in a process of its own, which gives all of its memory back
            process = multiprocessing.get_context("spawn").Process(target=_make_base, args=(_base_of(folder),))
            process.start()
            process.join()
        _compare(arguments, folder)


def _base_of(folder: Path) -> Path:
    return folder / "models" / "checkpoints" / "random_sd15.safetensors"


def _make_base(path: Path) -> None:
    write_single_file(random_pipeline("sd15", torch.float16), "sd15", path)


def _compare(arguments: argparse.Namespace, folder: Path) -> None:
    measured: dict[str, list[dict]] = {name: [] for name in arguments.variants}
    command = [sys.executable, __file__, "--folder", str(folder), "--size", str(arguments.size)]
    command += ["--steps", str(arguments.steps)]
    for number in range(arguments.rounds):
        shift = number % len(arguments.variants)
        for name in arguments.variants[shift:] + arguments.variants[:shift]:
            done = subprocess.run([*command, "--one", name], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-4000:]}")
            measured[name].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"SD1.5, {arguments.size} pixels, {torch.get_num_threads()} threads, {arguments.rounds} rounds")
    for name, runs in measured.items():
        plain, excited = (statistics.median(t for run in runs for t in run[kind]) for kind in ("plain", "excited"))
        memory = [max(run[kind] for run in runs) for kind in ("plain GB", "excited GB")]
        print(
            f"{name}: plain {plain:.1f} s a step, {memory[0]:.2f} GB; excited {excited:.1f} s a step ({excited / plain:.2f} "
            f"times), {memory[1]:.2f} GB (+{memory[1] - memory[0]:.2f})"
        )


class Clock:
    """Times of the steps, by what is called after each."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, *_args, **_options):
        self.times.append(time.perf_counter())
        return {}

    @property
    def seconds(self) -> list[float]:
        """Of the steps but the first, before which everything is set up."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def _gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _measured(plain, excited) -> dict:
    """Run both with a clock each."""
    found = {}
    for name, run in (("plain", plain), ("excited", excited)):
        clock = Clock()
        run(clock)
        found |= {name: clock.seconds, f"{name} GB": _gigabytes()}
    return found


def _noise(size: int) -> torch.Tensor:
    return torch.randn(1, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(0))


def _pipeline(base: Path):
    """diffusers' plain pipeline with DDIM, as the other one has it, and the places of the words."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    loaded = load_base(str(base))
    parts = dict(loaded.pipeline.components)
    parts["scheduler"] = DDIMScheduler.from_config(parts["scheduler"].config)
    pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.requires_grad_(False)
    return pipeline, excited_places(loaded, PROMPT, ", ".join(WORDS))


def in_diffusers(base: Path, size: int, steps: int) -> dict:
    from diffusers import StableDiffusionAttendAndExcitePipeline

    pipeline, places = _pipeline(base)
    parts = {name: part for name, part in pipeline.components.items() if name != "image_encoder"}
    theirs = StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps + 1, "guidance_scale": GUIDANCE, "latents": _noise(size)}
    options |= {"height": size, "width": size, "output_type": "latent"}

    def excited(clock):
        theirs(
            PROMPT,
            [place for (place,) in places],
            max_iter_to_alter=steps + 1,
            thresholds={},
            attn_res=(size // 32, size // 32),
            callback=clock,
            **options,
        )

    return _measured(lambda clock: pipeline(PROMPT, callback_on_step_end=clock, **options), excited)


def headless(base: Path, size: int, steps: int) -> dict:
    pipeline, places = _pipeline(base)
    options = {"num_inference_steps": steps + 1, "guidance_scale": GUIDANCE, "height": size, "width": size}
    options |= {"output_type": "latent"}

    def excited(clock):
        text = pipeline.encode_prompt(PROMPT, "cpu", 1, False)[0]
        pipeline.scheduler.set_timesteps(steps + 1)
        settings = Excitement(steps=steps + 1, thresholds={})
        exciting = AttendAndExcite(pipeline.unet, pipeline.scheduler, text, [places], settings)

        def after(*arguments):
            clock()
            return exciting.callback(*arguments)

        latents = exciting.before_first(_noise(size))
        pipeline(PROMPT, latents=latents, callback_on_step_end=after, **options)

    return _measured(lambda c: pipeline(PROMPT, latents=_noise(size), callback_on_step_end=c, **options), excited)


def in_comfyui(base: Path, size: int, steps: int, low_memory: bool = False) -> dict:
    from inprocess import Host

    host = Host(COMFYUI, base.parents[2], ROOT)
    import comfy.sample

    model, clip, _ = host.nodes.CheckpointLoaderSimple().load_checkpoint(base.name)[:3]
    negative = host.nodes.CLIPTextEncode().encode(clip, "")[0]
    made = host.node("PersonalizeAttendAndExcite").execute(
        model, clip, PROMPT, ", ".join(WORDS), steps=steps + 1, thresholds="", low_memory=low_memory
    )
    plain = (model, host.nodes.CLIPTextEncode().encode(clip, PROMPT)[0])

    def sample(given, clock):
        patched, positive = given
        with torch.inference_mode():
            comfy.sample.sample(
                patched,
                _noise(size),
                steps + 1,
                GUIDANCE,
                "ddim",
                "normal",
                positive,
                negative,
                torch.zeros(1, 4, size // 8, size // 8),
                callback=clock,
                disable_pbar=True,
                seed=0,
            )

    return _measured(lambda clock: sample(plain, clock), lambda clock: sample(made.result, clock))


VARIANTS = {
    "diffusers": in_diffusers,
    "ours, headless": headless,
    "ours, ComfyUI": in_comfyui,
    "ours, ComfyUI, low memory": functools.partial(in_comfyui, low_memory=True),
}


if __name__ == "__main__":
    main()
