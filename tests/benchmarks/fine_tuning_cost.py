"""What a training step costs, against diffusers' example script of the same method, on a whole SD1.5 of random weights.

    python tests/benchmarks/fine_tuning_cost.py --diffusers FOLDER --photos FOLDER [--resolution 256] [--steps 9]

FOLDER is a checkout of diffusers, whose version must be that of the installed package or earlier. Both sides get the
same model, pictures, size, precision and options (batch 1, AdamW, no text encoder trained, latents cached where the
script can), in processes of their own, one after the other, in turn. Read from the progress bars: the time from the
start of the process to the end of the first step, and the steps' rate from there on. The most memory is the kernel's
figure for the process, or on CUDA the device's.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from conftest import ROOT
from structural.full_models import random_pipeline, write_single_file

SCRIPTS = {
    "dreambooth": "examples/dreambooth/train_dreambooth.py",
    "lora": "examples/dreambooth/train_dreambooth_lora.py",
    "textual_inversion": "examples/textual_inversion/textual_inversion.py",
}
OURS, THEIRS = "ours", "diffusers"


@dataclass
class Cost:
    """Of one run."""

    first_step: float
    """Seconds from the process's start to the end of its first step."""
    rate: float
    """Steps a second, after the first."""
    memory: float
    """GB at most."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", type=Path, required=True, help="a checkout of diffusers")
    parser.add_argument("--photos", type=Path, required=True, help="a folder of pictures")
    parser.add_argument("--methods", nargs="+", choices=tuple(SCRIPTS), default=list(SCRIPTS))
    parser.add_argument("--resolution", type=int, default=512 if torch.cuda.is_available() else 256)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--precision", default="bf16" if torch.cuda.is_available() else "no", choices=("no", "bf16", "fp16")
    )
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing, on both sides")
    parser.add_argument("--folder", type=Path, help="to keep the model in")
    return parser.parse_args()


def commands(method: str, arguments: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """The same training, by us and by diffusers."""
    both = ["--resolution", str(arguments.resolution), "--train_batch_size", "1", "--seed", "0"]
    both += ["--max_train_steps", str(arguments.steps), "--mixed_precision", arguments.precision]
    both += ["--gradient_checkpointing"] * arguments.checkpointing + ["--learning_rate", "1e-5"]
    ours = [
        sys.executable,
        "-m",
        f"training.{method}",
        "--pretrained_model_name_or_path",
        str(folder / "sd15.safetensors"),
    ]
    ours += ["--instance_data_dir", str(arguments.photos), "--output_dir", str(folder / "ours"), "--no-buckets"]
    ours += ["--no-train_text_encoder", "--resume_from_checkpoint", "none", *both]
    theirs = [sys.executable, str(arguments.diffusers / SCRIPTS[method]), "--output_dir", str(folder / "theirs"), *both]
    theirs += ["--pretrained_model_name_or_path", str(folder / "sd15"), "--lr_scheduler", "constant"]
    theirs += ["--checkpointing_steps", "100000"]
    if method == "textual_inversion":
        theirs += [
            "--train_data_dir",
            str(arguments.photos),
            "--placeholder_token",
            "<ohwx>",
            "--initializer_token",
            "thing",
        ]
        theirs += ["--num_vectors", "1", "--save_steps", "100000"]
        ours += ["--num_vectors", "1", "--class_name", "thing"]
    else:
        theirs += ["--instance_data_dir", str(arguments.photos), "--instance_prompt", "a photo of ohwx thing"]
        theirs += ["--pre_compute_text_embeddings"]
        ours += ["--class_name", "thing"]
    if method == "lora":
        theirs += ["--rank", "16"]
        ours += ["--rank", "16"]
    return {OURS: ours, THEIRS: theirs}


def bar_of(steps: int) -> Callable[[bytes, bytes], list[int]]:
    """Finds in a block of what was printed which of so many steps are done, by the progress bar."""
    return lambda block, _: [
        int(n) for n, of in re.findall(rb"(\d+)/(\d+) \[", block) if int(of) == steps and int(n) > 0
    ]


def measure(command: list[str], done: Callable[[bytes, bytes], list[int]]) -> Cost:
    """Run it to the end and read what it prints.

    Args:
        done: finds the numbers of steps in a block, and in the text up to it.
    """
    started = time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    seen: dict[int, float] = {}
    text = b""
    while block := os.read(process.stdout.fileno(), 4096):
        now, text = time.monotonic() - started, (text + block)[-20000:]
        for number in done(block, text):
            seen.setdefault(number, now)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{text.decode(errors='replace')[-3000:]}")
    first, last = min(seen), max(seen)
    return Cost(seen[first], (last - first) / (seen[last] - seen[first]), usage.ru_maxrss / 1e6)


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / "sd15").exists():
            pipeline = random_pipeline("sd15")
            pipeline.save_pretrained(folder / "sd15")
            write_single_file(pipeline, "sd15", folder / "sd15.safetensors")
            del pipeline
        print(f"SD1.5 of random weights, {arguments.resolution} px, batch 1, precision {arguments.precision}")
        for method in arguments.methods:
            costs: dict[str, list[Cost]] = {OURS: [], THEIRS: []}
            for turn in range(arguments.rounds):
                for who, command in list(commands(method, arguments, folder).items())[:: 1 if turn % 2 == 0 else -1]:
                    costs[who].append(measure(command, bar_of(arguments.steps)))
            report(method, costs)


def report(method: str, costs: dict[str, list[Cost]]) -> None:
    for who, some in costs.items():
        first, rate, memory = (statistics.median(getattr(x, y) for x in some) for y in ("first_step", "rate", "memory"))
        print(f"{method:18} {who:10} first step {first:6.1f} s  {rate:7.3f} steps/s  {memory:5.1f} GB")
    pairs = list(zip(costs[OURS], costs[THEIRS], strict=True))
    rate = statistics.median(a.rate / b.rate for a, b in pairs)
    memory = statistics.median(a.memory / b.memory for a, b in pairs)
    first = statistics.median(a.first_step / b.first_step for a, b in pairs)
    print(f"{method:18} ours / diffusers: steps/s {rate:.2f}, memory {memory:.2f}, time to first step {first:.2f}")


if __name__ == "__main__":
    main()
