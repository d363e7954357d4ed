"""Two pocket subjects that the model has never seen, together in one picture, counted by the judge.

    python tests/benchmarks/two_concepts.py --output FOLDER [--pairs 16] [--seeds 8] [--options "..."]

Of each subject there are five pictures, of it alone. Each pair is learned

- together by Custom Diffusion, all of the cross-attention in one training of twice the steps, which sees pictures of both
  side by side, too (Cut-Mix);
- apart by Custom Diffusion, in smaller steps, which leave more to merge with, and merged in closed form by our node, with
  captions as the pocket model knows them;
- apart by LoRA, and both LoRAs loaded, one after the other, at full strength and at 0.8.

Else each training is the command a user would run, with the defaults of its method. Then "a photo of a {one} and a {other}" is
drawn at eight places, 96 x 64 pixels, with the stock KSampler (20 steps, euler, cfg 4), the same noise for all; and by the
base itself, which is told in words all that belongs to each: what a method could reach that draws two subjects as well as
the base does. Counted are, with the subjects in either order:

- identity: attributes that each half can show of its subject, read as the subject's;
- both: pictures in which that is so of two thirds of each subject's;
- apart: how much nearer each half is to its own subject than to the other (cosine of the judge's identity features).

Intervals (95 %) draw pairs again. The folder keeps everything, and the same command goes on with it; sheet.png has the first
place and the first seeds of every pair, unchosen.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import einops
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import ROOT
from pack.models.bootstrap import bootstrap, bootstrap_difference
from pack.models.measures import mean_by_group
from pack.training.defaults import DEFAULTS
from pack.training.pocket.attributes import Scene, Subject
from pack.training.pocket.captions import PLACE_WORDS, identity_words
from pack.training.pocket.data import identity
from pack.training.pocket.judge import windows
from pack.training.pocket.measure import VALUES, fresh_captions, read
from pack.training.pocket.photos import SUBJECTS, write_photos
from pack.training.pocket.vae import to_tensor
from personalization import BASE, PHOTOS, Studio
from shown import own_values, own_vectors

JOINT, MERGED, STACKED = "Custom Diffusion, together", "Custom Diffusion, merged", "LoRA, both loaded"
WORDS = "the base, told in words"
STRENGTHS = {STACKED: 1.0, f"{STACKED} at 0.8": 0.8}  # of 0.4 to 1, the two best
METHODS = (JOINT, MERGED, *STRENGTHS, WORDS)
TRIGGERS = ("ohwx", "zxcv")
PLACES = ("beach", "forest", "city", "mountains", "blue", "yellow", "purple", "grey")
FIRST = 200  # of the subjects, none of which anything else is measured on
CHOOSING = 12
"""The first pairs, by which the settings of all methods were chosen; they are left out."""
CAPTIONS = "\n".join(words.text for count in (1, 2) for words in fresh_captions(100, count))
KNOWN = 2 / 3
WHOLE = ("--train_layers", "all", "--learning_rate", "3e-4")
"""Queries and outputs know better than keys and values alone which subject is where; more weights, in smaller steps."""
SMALL = ("--learning_rate", "3e-4", "--timestep_bias_strategy", "none")
"""The defaults learn more, and merged change everyday captions about three times as much: pictures fall apart."""


def pairs(count):
    """Numbers of so many pairs of subjects of different kinds."""
    found, number = [], FIRST
    while len(found) < count + CHOOSING:
        one, other = number, number + 1
        while identity(SUBJECTS, other).kind == identity(SUBJECTS, one).kind:
            other += 1
        found.append((one, other))
        number = other + 1
    return found[CHOOSING:]


def train(method, output, name, *options):
    """The minutes it took; a file that is there is kept."""
    path = output / f"{name}.safetensors"
    command = [sys.executable, "-m", f"training.{method}", "--output_dir", str(output), "--output_name", name, *options]
    command += ["--pretrained_model_name_or_path", str(ROOT / "models" / "pocket" / "checkpoints" / BASE)]
    if not path.exists():
        started = time.monotonic()
        with (output.parent / f"{output.name}.log").open("w") as log:
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=True, env={**os.environ})
        (output / "minutes.txt").write_text(str((time.monotonic() - started) / 60))
    return float((output / "minutes.txt").read_text())


def trained(folder, both, pair, options, prior):
    """Minutes of each method; the files lie in the folder."""
    photos = [folder / name for name in "ab"]
    for place, number in zip(photos, both, strict=True):
        write_photos(place, number, PHOTOS)
    whole = list(zip(photos, TRIGGERS, (identity(SUBJECTS, n).kind for n in both), strict=True))
    concepts = [part for photo, trigger, kind in whole for part in ("--concept", f"{photo}:{trigger}:{kind}")]
    twice = ["--max_train_steps", str(2 * DEFAULTS["pocket"]["custom_diffusion"].max_train_steps)]
    classes = folder.parent / "class"

    def preserving(place):
        return (
            ["--with_prior_preservation", "--num_class_images", "100", "--class_data_dir", str(place)] if prior else []
        )

    together = [*concepts, *twice, *WHOLE, *preserving(classes), *options]
    minutes = {JOINT: train("custom_diffusion", folder / "joint", f"p{pair}_joint", *together), WORDS: 0.0}
    for method, trainer in ((MERGED, "custom_diffusion"), (STACKED, "lora")):
        minutes[method] = 0.0
        for (photo, trigger, kind), letter in zip(whole, "ab", strict=True):
            own = ["--instance_data_dir", str(photo), "--trigger", trigger, "--class_name", kind]
            name = f"p{pair}_{trainer}_{letter}"
            minutes[method] += train(
                trainer,
                folder / f"{trainer}_{letter}",
                name,
                *own,
                *([*SMALL, *preserving(classes / kind), *options] if method == MERGED else []),
            )
    return minutes | dict.fromkeys(STRENGTHS, minutes[STACKED])


def loaded(studio, folder, pair, both):
    """By method the model, and what each subject is called."""
    base, host = studio.base, studio.host

    def node(name, *arguments):
        return host.node(f"Personalize{name}").execute(*arguments).result

    for path in folder.glob("*/p*.safetensors"):
        kind = "embeddings" if path.stem.endswith(TRIGGERS) else "loras"
        target = host.base / "models" / kind / path.name
        target.parent.mkdir(exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to(path.resolve())
    made = {}
    joint, trigger = node("LoadCustomDiffusion", base[0], f"p{pair}_joint.safetensors", 1.0)
    made[JOINT] = joint, trigger.split(", ")
    files = [f"p{pair}_custom_diffusion_{letter}.safetensors" for letter in "ab"]
    merged, trigger, report = node("MergeCustomDiffusion", *base[:2], *files, 1.0, CAPTIONS)
    made[MERGED] = merged, trigger.split(", ")
    print(f"pair {pair}: {report}")
    for name, strength in STRENGTHS.items():
        stacked = base[0]
        for letter in "ab":
            stacked, _, _ = node("LoadLoRA", stacked, f"p{pair}_lora_{letter}.safetensors", strength, 0.0)
        made[name] = stacked, [f"{trigger} {who.kind}" for trigger, who in zip(TRIGGERS, both, strict=True)]
    made = {name: (model, [f"a {call}" for call in calls]) for name, (model, calls) in made.items()}
    scenes = [Scene((Subject(who, "front", "smiling", False),), "blue") for who in both]
    rng = np.random.default_rng(pair)
    made[WORDS] = base[0], [identity_words(scene.subject_values()[0], rng) for scene in scenes]
    return made


def drawn(studio, folder, pair, both, seeds):
    """[places, seeds, 64, 96, 3] uint8 by method; what is in the folder is kept."""
    if not all((folder / f"{name}.png").exists() for name in METHODS):
        for name, (model, calls) in loaded(studio, folder, pair, both).items():
            rows, joint = [], ("," * any("," in call for call in calls) + " and ").join(calls)
            for i, place in enumerate(PLACES):
                where = PLACE_WORDS.get(place, (f"on a {place} background",))[0]
                some = studio.sample(model, *studio.base[1:], f"a photo of {joint}, {where}", 1000 + i, seeds, width=96)
                rows.append(np.concatenate(list(some), 1))
            Image.fromarray(np.concatenate(rows)).save(folder / f"{name}.png")
    sheets = {name: np.asarray(Image.open(folder / f"{name}.png")) for name in METHODS}
    return {name: einops.rearrange(s, "(p h) (n w) c -> p n h w c", h=64, w=96) for name, s in sheets.items()}


@torch.no_grad()
def counted(studio, pictures, both):
    """[n, 3]: identity, both, apart, of the better order."""
    halves = read(studio.judge, pictures)
    vectors = [studio.judge(window)[1] for window in windows(to_tensor(pictures))]
    whose = [own_vectors(studio.judge, who) for who in both]
    rows = []
    for i in range(len(pictures)):
        best = None
        for order in ((0, 1), (1, 0)):
            shares = []
            for half, k in zip(halves, order, strict=True):
                shown = {name: VALUES[name][numbers[i]] for name, numbers in half.items()}
                shares.append(np.mean([shown[name] == value for name, value in own_values(both[k], shown).items()]))
            apart = np.mean([float(vectors[h][i] @ (whose[k] - whose[1 - k])) for h, k in enumerate(order)])
            row = (np.mean(shares), float(min(shares) >= KNOWN), apart)
            best = row if best is None or row[0] > best[0] else best
        rows.append(best)
    return torch.tensor(rows, dtype=torch.double)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--options", default="", help="more options of Custom Diffusion's trainings, in quotes")
    parser.add_argument(
        "--prior", action="store_true", help="of Custom Diffusion's trainings, with pictures of the class"
    )
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    asked, kept = json.dumps([arguments.options, arguments.prior, arguments.seeds]), arguments.output / "asked.json"
    if kept.exists() and kept.read_text() != asked:
        parser.error(f"{arguments.output} has pictures with other options, which stay as they are: name another folder")
    kept.write_text(asked)
    studio = Studio(arguments.output / "comfyui")
    scores, minutes, tiles = {name: [] for name in METHODS}, {name: [] for name in METHODS}, []
    names, groups = [f"pair {i}" for i in range(arguments.pairs)], torch.arange(arguments.pairs)
    for pair, numbers in enumerate(pairs(arguments.pairs)):
        folder = arguments.output / f"pair{pair}"
        folder.mkdir(parents=True, exist_ok=True)
        both = [identity(SUBJECTS, number) for number in numbers]
        for name, took in trained(folder, numbers, pair, arguments.options.split(), arguments.prior).items():
            minutes[name].append(took)
        for name, pictures in drawn(studio, folder, pair, both, arguments.seeds).items():
            scores[name].append(counted(studio, pictures.reshape(-1, *pictures.shape[2:]), both).mean(0))
            tiles.append(np.concatenate(list(pictures[0, :4]), 1))
    figures = {}
    for column, what in enumerate(("identity", "both", "apart")):
        found = {n: bootstrap(names, mean_by_group(torch.stack(r)[:, column], groups), 2000) for n, r in scores.items()}
        for name, estimate in found.items():
            figures[f"{name}, {what}"] = [estimate.value, *estimate.interval]
        for name, other in itertools.product((JOINT, MERGED), STRENGTHS):
            difference = bootstrap_difference(found[name], found[other])
            figures[f"{name} - {other}, {what}"] = [difference.value, *difference.interval]
    for title, (value, low, high) in figures.items():
        print(f"{title}: {value:.3f} [{low:.3f}, {high:.3f}]")
    for name, took in minutes.items():
        print(f"{name}: {np.mean(took):.1f} minutes of training a pair")
        figures[f"{name}, minutes"] = float(np.mean(took))
    (arguments.output / "figures.json").write_text(json.dumps(figures, indent=1))
    width = len(METHODS)
    grid = [np.concatenate(tiles[i : i + width], 1) for i in range(0, len(tiles), width)]
    Image.fromarray(np.concatenate(grid)).save(arguments.output / "sheet.png")


if __name__ == "__main__":
    main()
