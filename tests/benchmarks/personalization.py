"""What each method makes of five pictures of a pocket subject that the model has never seen, counted by the judge.

    python tests/benchmarks/personalization.py [--identity N ...] [--methods ...] [--output FOLDER]

Each training is the command a user would run, with the defaults of its method, in a process of its own; the table says
how long it took and the most memory it had. The file is then loaded in ComfyUI by our node, and 64 prompts that name a
pose, an expression and a background are sampled with the stock KSampler (20 steps, euler, cfg 4). Counted are:

- identity: attributes that a picture of this subject with that pose, expression and hat shows, read as the subject's;
- likeness: the mean cosine of the judge's identity features to those of pictures drawn of the subject;
- pose, expression, background: read as the prompt says;
- diversity: the mean cosine distance between two of the 64 pictures, by the judge's features;
- of "a {class}" alone: how often its attributes are the subject's, and the diversity of identities.

Beside them stand the untrained base with the same prompts ("a {class}"), and drawings of the subject: what a perfect
method would reach.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import COMFYUI, ROOT
from inprocess import Host
from pack.training.pocket.attributes import (
    BACKGROUNDS,
    EXPRESSIONS,
    POSES,
    SUBJECT_VALUES,
    Identity,
    Scene,
    Subject,
)
from pack.training.pocket.captions import EXPRESSION_WORDS, PLACE_WORDS, POSE_WORDS
from pack.training.pocket.data import identity
from pack.training.pocket.draw import draw
from pack.training.pocket.measure import VALUES, read
from pack.training.pocket.photos import SUBJECTS, write_photos
from pack.training.pocket.shipped import load_judge
from pack.training.pocket.vae import to_tensor

METHODS = {  # name: (trainer, more options, the folder its files belong in)
    "Textual Inversion": ("textual_inversion", [], "embeddings"),
    "LoRA": ("lora", [], "loras"),
    "DreamBooth": ("dreambooth", [], "checkpoints"),
    "DreamBooth, prior preserved": ("dreambooth", ["--with_prior_preservation"], "checkpoints"),
    "Custom Diffusion": ("custom_diffusion", [], "loras"),
    "Custom Diffusion, prior preserved": ("custom_diffusion", ["--with_prior_preservation"], "loras"),
}
BASE = "pocket_portraits.safetensors"
PICTURES, BATCH, PHOTOS = 64, 16, 5
PROMPTED = {"pose": POSES, "expression": EXPRESSIONS, "background": BACKGROUNDS}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--identity", type=int, nargs="+", default=[10, 26, 5], help="of training.pocket photos")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--options", default="", help="more options for every training, in quotes")
    parser.add_argument("--output", type=Path, default=Path(tempfile.mkdtemp()), help="for files, pictures and figures")
    return parser.parse_args() if COMFYUI else parser.error("no ComfyUI found: set COMFYUI_PATH")


def train(method: str, photos: Path, kind: str, output: Path, options: list[str]) -> tuple[Path, float, float]:
    """The file, the minutes it took, and the most memory in GB."""
    trainer, own, _ = METHODS[method]
    command = [sys.executable, "-m", f"training.{trainer}", "--instance_data_dir", str(photos), "--class_name", kind]
    command += ["--pretrained_model_name_or_path", str(ROOT / "models" / "pocket" / "checkpoints" / BASE)]
    command += ["--output_dir", str(output), "--resume_from_checkpoint", "none", *own, *options]
    if "--with_prior_preservation" in own:
        command += ["--class_data_dir", str(output.parent / "class")]
    started = time.monotonic()
    with (output.parent / f"{output.name}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed, see {log.name}.")
    files = sorted(path for path in output.glob("*.safetensors") if ".delta." not in path.name)
    return files[0], (time.monotonic() - started) / 60, usage.ru_maxrss / 1e6


def prompts() -> list[dict[str, str]]:
    """Pose, expression and background of each picture, each as often as any other."""
    rng = np.random.default_rng(PICTURES)
    columns = {name: [values[i % len(values)] for i in rng.permutation(PICTURES)] for name, values in PROMPTED.items()}
    return [{name: column[i] for name, column in columns.items()} for i in range(PICTURES)]


def in_words(wanted: dict[str, str], subject: str) -> str:
    """A prompt as the pocket model's captions say it."""
    place = PLACE_WORDS.get(wanted["background"], (f"on a {wanted['background']} background",))[0]
    expression, pose = EXPRESSION_WORDS[wanted["expression"]][0], POSE_WORDS[wanted["pose"]][0]
    return f"a photo of a {expression} {subject}, {pose}, {place}"


class Studio:
    """ComfyUI with our nodes, and the judge."""

    def __init__(self, folder: Path):
        self.host = Host(COMFYUI, folder, ROOT)
        self.base = self.host.nodes.CheckpointLoaderSimple().load_checkpoint(BASE)
        self.judge = load_judge()

    def load(self, file: Path, kind: str) -> tuple:
        """MODEL, CLIP, VAE and the subject's words, by our node that takes any of our files."""
        for path in (file, *file.parent.glob(f"{file.stem}_*.safetensors")):  # and the words of Custom Diffusion
            target = self.host.base / "models" / (kind if path == file else "embeddings") / path.name
            target.parent.mkdir(exist_ok=True)
            target.unlink(missing_ok=True)
            target.symlink_to(path.resolve())
        return self.host.node("PersonalizeLoadPersonalization").execute(f"{kind}/{file.name}", 1.0, *self.base).result

    def sample(self, model, clip, vae, text: str, seed: int, count: int = 1, width: int = 64) -> np.ndarray:
        """[count, 64, width, 3] uint8."""
        nodes = self.host.nodes
        positive, negative = (nodes.CLIPTextEncode().encode(clip, words)[0] for words in (text, ""))
        (latent,) = nodes.EmptyLatentImage().generate(width, 64, count)
        options = (seed, 20, 4.0, "euler", "normal", positive, negative, latent, 1.0)
        (samples,) = nodes.KSampler().sample(model, *options)
        (pictures,) = nodes.VAEDecode().decode(vae, samples)
        return (pictures.clamp(0, 1) * 255).round().byte().numpy()

    @torch.no_grad()
    def count(self, pictures: np.ndarray, who: Identity, wanted: list[dict[str, str]]) -> dict[str, float]:
        """Shares of right readings, likeness and diversity. Where a prompt is silent, the picture's own reading counts."""
        seen = read(self.judge, pictures)[0]
        drawn, right, of = [], Counter[str](), Counter[str]()
        for i, prompt in enumerate(wanted):
            shown = {name: VALUES[name][seen[name][i]] for name in ("pose", "expression", "hat_worn", "background")}
            for name, value in prompt.items():
                right[name] += shown[name] == value
                of[name] += 1
            shown |= prompt
            subject = Subject(who, shown["pose"], shown["expression"], shown["hat_worn"] == "yes")
            drawn.append(draw(Scene((subject,), shown["background"], seed=i)))
            for name, value in subject.values().items():
                if name not in ("kind", "pose", "expression", "hat_worn"):
                    hit = SUBJECT_VALUES[name][seen[name][i]] == value
                    for key in ("identity", f"its {name}"):
                        right[key] += hit
                        of[key] += 1
        own = self.judge(to_tensor(np.stack([np.asarray(picture) for picture in drawn])))[1]
        theirs = self.judge(to_tensor(pictures))[1]
        features = torch.nn.functional.normalize(self.judge.features(to_tensor(pictures)), dim=1)
        scores = {name: right[name] / of[name] for name in of}
        scores["likeness"] = (own * theirs).sum(1).mean().item()
        scores["diversity"] = _apart(features)
        scores["diversity of identities"] = _apart(theirs)
        return scores


def _apart(vectors: torch.Tensor) -> float:
    """Mean cosine distance between two of [n, d] vectors of length 1."""
    n = len(vectors)
    return 1 - ((vectors @ vectors.T).sum().item() - n) / (n * (n - 1))


def drawings(who: Identity, wanted: list[dict[str, str]]) -> np.ndarray:
    """The subject as it is."""
    rng = np.random.default_rng(1)
    scenes = []
    for i, shown in enumerate(wanted):
        subject = Subject(who, shown["pose"], shown["expression"], bool(rng.random() < 0.35))
        scenes.append(Scene((subject,), shown["background"], seed=1000 + i))
    return np.stack([np.asarray(draw(picture)) for picture in scenes])


def sheet(pictures: np.ndarray, path: Path) -> None:
    """All in rows of 16."""
    rows = [np.concatenate(list(pictures[i : i + 16]), 1) for i in range(0, len(pictures), 16)]
    Image.fromarray(np.concatenate(rows)).save(path)


def main() -> None:
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    studio, wanted = Studio(arguments.output / "comfyui"), prompts()
    silent: list[dict[str, str]] = [{}] * PICTURES
    for number in arguments.identity:
        who, folder = identity(SUBJECTS, number), arguments.output / str(number)
        write_photos(folder / "photos", number, PHOTOS)
        results = {"drawings": studio.count(drawings(who, wanted), who, wanted)}
        made = {"base": (*studio.base, who.kind)}
        for method in arguments.methods:
            file, minutes, memory = train(
                method, folder / "photos", who.kind, folder / method, arguments.options.split()
            )
            results[method] = {"minutes": minutes, "GB": memory, "MB of file": file.stat().st_size / 1e6}
            model, clip, vae, trigger = studio.load(file, METHODS[method][2])
            named = trigger if trigger.endswith(f" {who.kind}") else f"{trigger} {who.kind}"
            made[method] = (model, clip, vae, named)
        for name, (model, clip, vae, subject) in made.items():
            pictures = np.concatenate(
                [studio.sample(model, clip, vae, in_words(prompt, subject), 100 + i) for i, prompt in enumerate(wanted)]
            )
            alone = np.concatenate(
                [studio.sample(model, clip, vae, f"a {who.kind}", i, BATCH) for i in range(0, PICTURES, BATCH)]
            )
            sheet(np.concatenate([pictures, alone]), folder / f"{name}.png")
            scores = studio.count(pictures, who, wanted)
            class_alone = studio.count(alone, who, silent)
            kept = {
                f"class alone, {key}": class_alone[key] for key in ("identity", "likeness", "diversity of identities")
            }
            results[name] = results.get(name, {}) | scores | kept
            print(
                f"identity {number} ({who.kind}), {name}: "
                + ", ".join(f"{k} {v:.3g}" for k, v in results[name].items())
            )
        (folder / "figures.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
