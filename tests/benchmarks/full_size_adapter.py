"""IP-Adapter training by leave-one-out on a whole SD1.5 or SDXL and a ViT-H of random weights, and its file in ComfyUI.

    python tests/benchmarks/full_size_adapter.py --people FOLDER [--family sd15|sdxl] [--resolution 512] [--steps 2]

From lone files, offline, as a user runs it: from scratch with pooling, the file of which diffusers' own loader must take,
then from that file with self-attention, which ComfyUI must apply to every layer. Printed are times and the most memory.
"""

import argparse
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import COMFYUI, ROOT
from full_size import expect, make_base
from inprocess import Host
from pack.models.ip_adapter import IPAdapter, read_ip_adapter
from pack.training.identities import find_identities
from structural.full_models import random_pipeline
from structural.image_encoders import random_encoder, write_file

LAYERS = {"sd15": 16, "sdxl": 70}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=Path, required=True, help="a folder with a folder of pictures for each person")
    parser.add_argument("--family", choices=tuple(LAYERS), default="sd15")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--identities", type=int, default=4, help="of the folder, to keep the encoding short")
    parser.add_argument("--folder", type=Path, help="to keep the models and the results in; else they are deleted")
    return parser.parse_args() if COMFYUI else parser.error("no ComfyUI found: set COMFYUI_PATH")


def make_encoder(path: Path) -> None:
    """In half precision."""
    write_file(random_encoder(), path)


def alone(work, *arguments) -> None:
    """In a process of its own, which gives all of its memory back."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    expect(process.exitcode == 0)


def train(arguments: argparse.Namespace, folder: Path, name: str, *options: str) -> Path:
    """As a user does; returns the file, in ComfyUI's folder."""
    models, output = folder / "models", folder / "results" / name
    command = [sys.executable, "-m", "training.ip_adapter", "--output_dir", str(output), "--output_name", name]
    command += [
        "--pretrained_model_name_or_path",
        str(models / "checkpoints" / f"random_{arguments.family}.safetensors"),
    ]
    command += ["--image_encoder", str(models / "clip_vision" / "random_vit_h.safetensors")]
    command += ["--instance_data_dir", str(folder / "people"), "--resolution", str(arguments.resolution)]
    command += [
        "--max_train_steps",
        str(arguments.steps),
        "--gradient_checkpointing",
        "--cache_dir",
        str(folder / "cache"),
    ]
    started = time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout}\n{done.stderr[-4000:]}")
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(
        f"{name}: {arguments.steps} steps, {time.monotonic() - started:.0f} s in all, at most {most:.1f} GB until now"
    )
    target = models / "ipadapter" / f"{name}.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.safetensors").replace(target)
    return target


def check_in_diffusers(family: str, path: Path) -> None:
    """Its own loader takes the file with pooling, as it is."""
    pipeline = random_pipeline(family, torch.float16)
    pipeline.load_ip_adapter(str(path.parent), subfolder="", weight_name=path.name, image_encoder_folder=None)
    layers = [p for p in pipeline.unet.attn_processors.values() if hasattr(p, "to_k_ip")]
    print(f"diffusers: {len(layers)} of {LAYERS[family]} layers loaded")
    expect(len(layers) == LAYERS[family])


def check_in_comfyui(arguments: argparse.Namespace, folder: Path, path: Path) -> None:
    """The node gives every layer the image prompt of the self-attention."""
    host = Host(COMFYUI, folder, ROOT)
    from comfy.patcher_extension import WrappersMP

    model = host.nodes.CheckpointLoaderSimple().load_checkpoint(f"random_{arguments.family}.safetensors")[0]
    adapter = host.node("PersonalizeLoadIPAdapter").execute(path.name).result[0]
    vision = host.node("PersonalizeLoadImageEncoder").execute("random_vit_h.safetensors").result[0]
    person = next(iter(sorted((folder / "people").iterdir())))
    references = host.node("PersonalizeEncodeReferences").execute(vision, folder=str(person)).result[0]
    made = host.node("PersonalizeApplyIPAdapter").execute(model, adapter, references, 1.0, "self-attention").result[0]
    seen: dict = {}

    def unet(x, timestep, context, y, control, options):
        seen.update(options["patches_replace"]["attn2"])
        return x

    (wrapped,) = made.wrappers[WrappersMP.DIFFUSION_MODEL].values()
    wrapped[0](unet, torch.zeros(2, 4, 8, 8), transformer_options={})
    print(f"ComfyUI: {len(seen)} of {LAYERS[arguments.family]} layers attend to {len(references)} references")
    expect(len(seen) == LAYERS[arguments.family])
    shares = IPAdapter.from_state(read_ip_adapter(path)).attended(references).mean(0)
    print(f"attended to: {', '.join(f'{share:.3f}' for share in shares.tolist())}")


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        base = folder / "models" / "checkpoints" / f"random_{arguments.family}.safetensors"
        encoder = folder / "models" / "clip_vision" / "random_vit_h.safetensors"
        if not base.exists():
            alone(make_base, arguments.family, base)
        if not encoder.exists():
            alone(make_encoder, encoder)
        (folder / "people").mkdir(exist_ok=True)
        for person in list(find_identities(arguments.people).sets)[: arguments.identities]:
            if not (folder / "people" / person.name).exists():
                (folder / "people" / person.name).symlink_to(person.resolve(), target_is_directory=True)
        pooled = train(arguments, folder, "pooled", "--aggregation", "average")
        path = train(arguments, folder, "attention", "--aggregation", "self-attention", "--ip_adapter", str(pooled))
        check_in_diffusers(arguments.family, pooled)
        check_in_comfyui(arguments, folder, path)


if __name__ == "__main__":
    main()
