"""The trainers of a subject on whole SD1.5 and SDXL models of random weights, and their files in ComfyUI and diffusers.

    python tests/benchmarks/full_size.py --photos FOLDER [--family sd15|sdxl] [--resolution 512] [--steps 3]

From one file, offline. Each trainer runs as a user runs it; printed are the time until its first step, that of a step, how
long its default steps would take so, the most memory that it took, and the size of its files. Then every file goes through
ComfyUI's stock nodes: a LoRA and Custom Diffusion must change all of the layers that they were trained on, a word must change
the prompt, a DreamBooth file must load, and differ from the base in the trained tensors only. diffusers loads
LoRA and word. Needs about 20 GB of memory and 30 GB of disk for SDXL.
"""

import argparse
import gc
import json
import logging
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import COMFYUI, ROOT
from diffusers import UNet2DConditionModel
from fine_tuning_cost import bar_of, measure
from inprocess import Host
from pack.models.base_models import title_of
from pack.training.base_model import CONFIGS
from pack.training.defaults import DEFAULTS
from pack.training.shared import read_header
from safetensors.torch import load_file
from structural.full_models import random_pipeline, write_single_file

OPTIONS = {
    "lora": ["--train_text_encoder", "--rank", "8", "--lora_layers", "all"],
    "textual_inversion": ["--num_vectors", "4"],
    "dreambooth": ["--train_text_encoder", "--optimizer", "adafactor", "--fused_backward"],
    "custom_diffusion": [],
}
KINDS = {
    "lora": "loras",
    "textual_inversion": "embeddings",
    "dreambooth": "checkpoints",
    "custom_diffusion": "loras",
}
"""The folders of their files; Custom Diffusion's words are embeddings."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="a folder with pictures")
    parser.add_argument("--family", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=tuple(OPTIONS), default=list(OPTIONS))
    parser.add_argument("--folder", type=Path, help="to keep the model and the results in; else they are deleted")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if COMFYUI is None:
        raise SystemExit("no ComfyUI found: set COMFYUI_PATH")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        base = folder / "models" / "checkpoints" / f"random_{arguments.family}.safetensors"
        if not base.exists():  # in a process of its own, which gives all of its memory back
            process = multiprocessing.get_context("spawn").Process(target=make_base, args=(arguments.family, base))
            process.start()
            process.join()
            expect(process.exitcode == 0)
        for method in arguments.methods:
            train(arguments, method, base, folder)
        check_in_comfyui(arguments, base, folder)


def make_base(family: str, path: Path) -> None:
    """In half precision, as most are."""
    write_single_file(random_pipeline(family, torch.float16), family, path)


def train(arguments: argparse.Namespace, method: str, base: Path, folder: Path) -> None:
    """As a user does, offline."""
    output = folder / "results" / method
    command = [sys.executable, "-m", f"training.{method}", "--pretrained_model_name_or_path", str(base)]
    command += ["--instance_data_dir", str(arguments.photos), "--output_dir", str(output), "--output_name", method]
    command += ["--resolution", str(arguments.resolution), "--max_train_steps", str(arguments.steps)]
    command += ["--class_name", "thing", "--gradient_checkpointing", *OPTIONS[method]]
    cost, steps = measure(command, bar_of(arguments.steps)), DEFAULTS[arguments.family][method].max_train_steps
    files = sorted(output.glob("*.safetensors"))
    sizes = " + ".join(f"{path.stat().st_size / 1e6:.3g}" for path in files)
    print(
        f"{method}: first step after {cost.first_step:.0f} s, then {1 / cost.rate:.1f} s each: "
        f"{(cost.first_step + (steps - 1) / cost.rate) / 3600:.2f} h for {steps}; {cost.memory:.1f} GB; files of {sizes} MB"
    )
    for path in files:
        target = folder / "models" / (KINDS[method] if path.stem == method else "embeddings")
        target.mkdir(parents=True, exist_ok=True)
        path.replace(target / path.name)


class Complaints(logging.Handler):
    """What ComfyUI says of keys that it does not take."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "not loaded" in text or "missing" in text or "unexpected" in text or "left over" in text:
            self.lines.append(text)


def check_in_comfyui(arguments: argparse.Namespace, base: Path, folder: Path) -> None:
    """Every file, by the stock nodes and by ours; one model at a time is in memory."""
    host, complaints = Host(COMFYUI, folder, ROOT), Complaints()
    logging.getLogger().addHandler(complaints)
    logging.getLogger().setLevel(logging.INFO)
    known = check_with_the_base(arguments, host, base, folder, complaints)
    free()
    if "dreambooth" in arguments.methods:
        made = host.node("PersonalizeLoadDreamBooth").execute("dreambooth.safetensors", 1.0).result
        expect(made[3] == "ohwx")
        del made
        free()
        host.nodes.CheckpointLoaderSimple().load_checkpoint("dreambooth.safetensors")
        free()
        compare_bytes(base, folder / "models" / "checkpoints" / "dreambooth.safetensors")
    print(f"ComfyUI says of our files: {complaints.lines[known:] or 'nothing'}")
    check_in_diffusers(arguments, folder)


def free() -> None:
    """What ComfyUI keeps and nobody uses any more."""
    sys.modules["comfy.model_management"].unload_all_models()
    gc.collect()


def check_with_the_base(
    arguments: argparse.Namespace, host: Host, base: Path, folder: Path, complaints: Complaints
) -> int:
    """LoRA, Custom Diffusion and word; returns how many complaints there were of the base itself."""
    model, clip, _ = host.nodes.CheckpointLoaderSimple().load_checkpoint(base.name)[:3]
    known = list(complaints.lines)
    print(f"{title_of(arguments.family)} in ComfyUI; of the base it says: {known or 'nothing'}")
    if "lora" in arguments.methods:
        stock = host.nodes.LoraLoader().load_lora(model, clip, "lora.safetensors", 1.0, 1.0)
        ours = host.node("PersonalizeLoadLoRA").execute(model, "lora.safetensors", 1.0, 1.0, clip).result
        tensors = load_file(folder / "models" / "loras" / "lora.safetensors")
        layers = {key.split(".")[0] for key in tensors if ".lora_up." in key and bool(tensors[key].any())}
        expect(len(layers) == targeted(arguments.family))
        for name, made in (("stock", stock), ("ours", ours)):
            patched = len(made[0].patches) + len(made[1].patcher.patches)
            print(f"LoRA, {name}: {patched} of {len(layers)} layers changed")
            expect(patched == len(layers))
    if "custom_diffusion" in arguments.methods:
        patched = host.nodes.LoraLoader().load_lora(model, clip, "custom_diffusion.safetensors", 1.0, 1.0)[0].patches
        tensors = load_file(folder / "models" / "loras" / "custom_diffusion.safetensors")
        ours, trigger = (
            host.node("PersonalizeLoadCustomDiffusion").execute(model, "custom_diffusion.safetensors", 1.0).result
        )
        print(f"Custom Diffusion: {len(patched)} of {len(tensors)} layers changed, called {trigger}")
        expect(len(patched) == len(tensors) == len(ours.patches))
    if "textual_inversion" in arguments.methods:
        states = []
        for text in ("a photo of embedding:textual_inversion", "a photo of textual_inversion"):
            with torch.inference_mode():
                states.append(host.nodes.CLIPTextEncode().encode(clip, text)[0][0][0])
        change = (states[0] - states[1]).abs().max().item()
        print(f"word: changes the text states by up to {change:.3f}")
        expect(change > 0)
        trigger = host.node("PersonalizeLoadTextualInversion").execute(model, "textual_inversion.safetensors", 1.0)
        expect(trigger.result[2] == "embedding:textual_inversion")
    return len(known)


def targeted(family: str) -> int:
    """Layers that a LoRA of all kinds is for, counted in the networks: matrices and convolutions of attention, feed-
    forward and residual blocks."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(str(CONFIGS / family), subfolder="unet")
        )
    own = ("conv_in", "conv_out", "time_embedding", "add_embedding")
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    count = sum(isinstance(x, kinds) and not name.startswith(own) for name, x in unet.named_modules())
    for folder in ("text_encoder", "text_encoder_2"):
        if (CONFIGS / family / folder).exists():
            count += 4 * json.loads((CONFIGS / family / folder / "config.json").read_text())["num_hidden_layers"]
    return count


def compare_bytes(base: Path, trained: Path) -> None:
    """Only the trained tensors may differ."""
    (before, _, start), (after, _, begin) = read_header(base), read_header(trained)
    expect(before == after)
    changed = {True: 0, False: 0}
    with base.open("rb") as one, trained.open("rb") as two:
        for name, entry in before.items():
            first, last = entry["data_offsets"]
            one.seek(start + first)
            two.seek(begin + first)
            same = one.read(last - first) == two.read(last - first)
            changed[not same] += 1
            if not same:
                expect(name.startswith(("model.diffusion_model.", "cond_stage_model.", "conditioner.")))
    print(f"DreamBooth: {changed[True]} tensors differ from the base, {changed[False]} are the same byte for byte")
    expect(changed[True] > 0)


def check_in_diffusers(arguments: argparse.Namespace, folder: Path) -> None:
    """LoRA and word."""
    pipeline = random_pipeline(arguments.family, torch.float16)
    if "lora" in arguments.methods:
        path = folder / "models" / "loras" / "lora.safetensors"
        pipeline.load_lora_weights(str(path))
        layers = {key.split(".")[0] for key in load_file(path)}
        networks = [pipeline.unet, pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)]
        loaded = sum(name.endswith("lora_A.default_0.weight") for net in networks if net for name in net.state_dict())
        print(f"LoRA, diffusers: {loaded} of {len(layers)} layers loaded")
        expect(loaded == len(layers))
    if "textual_inversion" in arguments.methods:
        tensors = load_file(folder / "models" / "embeddings" / "textual_inversion.safetensors")
        if arguments.family == "sd15":
            pipeline.load_textual_inversion(
                str(folder / "models" / "embeddings" / "textual_inversion.safetensors"), token="<w>"
            )
        else:
            pairs = (("clip_l", "text_encoder", "tokenizer"), ("clip_g", "text_encoder_2", "tokenizer_2"))
            for key, encoder, tokenizer in pairs:
                pipeline.load_textual_inversion(
                    tensors[key],
                    token="<w>",
                    text_encoder=getattr(pipeline, encoder),
                    tokenizer=getattr(pipeline, tokenizer),
                )
        print(f"word, diffusers: loaded, {len(next(iter(tensors.values())))} vectors")


def expect(condition: bool) -> None:
    if not condition:
        raise SystemExit("that is wrong")


if __name__ == "__main__":
    main()
