"""What a step of IP-Adapter training costs, against tencent's tutorial_train.py, on a whole SD1.5 of random weights.

    python tests/benchmarks/adapter_training_cost.py --tencent FOLDER --people FOLDER [--resolution 256] [--steps 6]

FOLDER is a checkout of tencent-ailab/IP-Adapter; PEOPLE holds a folder for each person. Both sides get the same base, a
ViT-H of random weights, the same pictures, size, batch, precision and optimiser, and train the projection and W'_k, W'_v
from scratch with one reference, in processes of their own, one after the other, in turn. Ours with self-attention over
the references, which theirs has not, stands beside them. Read from what they print: seconds from the start of the process
to the end of the first step, the steps' rate from there on, and the kernel's figure for the most memory.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from fine_tuning_cost import Cost, bar_of, measure
from pack.training.identities import find_identities
from structural.full_models import random_pipeline, write_single_file
from structural.image_encoders import random_encoder, write_file

OURS, THEIRS, ATTENTION = "ours", "tencent", "ours, self-attention"
SHIM = """
import runpy, sys
import diffusers.pipelines.controlnet as moved
from diffusers.models import MultiControlNetModel
moved.MultiControlNetModel = MultiControlNetModel
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Their script looks for a class, which it does not use, where diffusers has it no more."""


def steps_of(who: str, steps: int) -> Callable[[bytes, bytes], list[int]]:
    """Finds which steps are done: they print a line for each, counted from 0; ours is the bar of the training."""
    if who == THEIRS:
        return lambda block, _: [int(number) for number in re.findall(rb"Epoch \d+, step (\d+), ", block)]
    bar = bar_of(steps)
    return lambda block, text: bar(block, text) if b"ip_adapter:" in text[-600:] else []


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tencent", type=Path, required=True, help="a checkout of tencent-ailab/IP-Adapter")
    parser.add_argument("--people", type=Path, required=True, help="a folder with a folder of pictures for each person")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="to keep the models in")
    return parser.parse_args()


def commands(arguments: argparse.Namespace, folder: Path, people: Path) -> dict[str, list[str]]:
    """The same training, by us and by them."""
    both = ["--resolution", str(arguments.resolution), "--train_batch_size", str(arguments.batch)]
    both += ["--learning_rate", "1e-4", "--mixed_precision", "no"]
    ours = [
        sys.executable,
        "-m",
        "training.ip_adapter",
        "--pretrained_model_name_or_path",
        str(folder / "sd15.safetensors"),
    ]
    ours += ["--image_encoder", str(folder / "vit_h.safetensors"), "--instance_data_dir", str(people), *both]
    ours += ["--no-buckets", "--max_train_steps", str(arguments.steps), "--resume_from_checkpoint", "none"]
    ours += ["--validation_identities", "0", "--checkpointing_steps", "100000", "--output_dir", str(folder / "ours")]
    theirs = [sys.executable, "-c", SHIM, str(arguments.tencent / "tutorial_train.py")]
    theirs += ["--pretrained_model_name_or_path", str(folder / "sd15"), "--image_encoder_path", str(folder / "vit_h")]
    theirs += [
        "--data_json_file",
        str(folder / "data.json"),
        "--data_root_path",
        str(people),
        "--num_train_epochs",
        "1",
    ]
    theirs += ["--output_dir", str(folder / "theirs"), *both]
    return {
        OURS: [*ours, "--aggregation", "average", "--max_references", "1"],
        THEIRS: theirs,
        ATTENTION: [*ours, "--aggregation", "self-attention", "--train_adapter"],
    }


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / "vit_h").exists():
            pipeline = random_pipeline("sd15")
            pipeline.save_pretrained(folder / "sd15")
            write_single_file(pipeline, "sd15", folder / "sd15.safetensors")
            encoder = random_encoder()
            encoder.save_pretrained(folder / "vit_h")
            write_file(encoder, folder / "vit_h.safetensors")
            del pipeline, encoder
        wanted = arguments.steps * arguments.batch
        people = folder / "people"
        sets = find_identities(arguments.people).sets
        pictures = [path for paths in sets.values() for path in paths[:4]][:wanted]
        if len(pictures) < wanted:
            raise SystemExit(f"{arguments.people} has {len(pictures)} pictures for {wanted}: fewer --steps or --batch.")
        for path in pictures:
            to = people / path.parent.name / path.name
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(path.read_bytes())
        data = [{"image_file": f"{p.parent.name}/{p.name}", "text": "a photo of a person"} for p in pictures]
        (folder / "data.json").write_text(json.dumps(data))
        print(f"SD1.5 and ViT-H of random weights, {arguments.resolution} px, batch {arguments.batch}, fp32")
        costs: dict[str, list[Cost]] = {OURS: [], THEIRS: [], ATTENTION: []}
        for turn in range(arguments.rounds):
            order = list(commands(arguments, folder, people).items())
            for who, command in order if turn % 2 == 0 else order[::-1]:
                costs[who].append(measure(command, steps_of(who, arguments.steps)))
        report(costs)


def report(costs: dict[str, list[Cost]]) -> None:
    for who, some in costs.items():
        first, rate, memory = (statistics.median(getattr(x, y) for x in some) for y in ("first_step", "rate", "memory"))
        print(f"{who:22} first step {first:6.1f} s  {rate:7.3f} steps/s  {memory:5.1f} GB")
    for who in (OURS, ATTENTION):
        pairs = list(zip(costs[who], costs[THEIRS], strict=True))
        rate = statistics.median(a.rate / b.rate for a, b in pairs)
        memory = statistics.median(a.memory / b.memory for a, b in pairs)
        print(f"{who} / tencent: steps/s {rate:.2f}, memory {memory:.2f}")


if __name__ == "__main__":
    main()
