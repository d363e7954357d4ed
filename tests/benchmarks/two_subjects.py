"""Prompts of a thing and an animal on the pocket model: plain, with Attend-and-Excite, and composed; counted by the judge.

    python tests/benchmarks/two_subjects.py --output FOLDER [--prompts 200 (of 510)] [--seeds 4]

A prompt names two subjects, each with a colour of its own, as the paper of Attend-and-Excite does ("a red scarf and an
orange cat"), the thing first, which no caption of the model's training does: so it forgets one of them or swaps colours.
64 pixels, 20 steps of Euler's method, guidance 4, the same noise for all methods. Counted are

- both: pictures that show both subjects;
- bound: pictures that show both, each in its own colour.

The intervals (95 %) draw prompts again. Attend-and-Excite excites the two subjects, with the node's settings but for the
steps, which are half of 20, without refinement. Composable Diffusion gets the prompt and, with half its weight, the
animal. The folder keeps pictures (a second run draws what is missing), figures.json and sheet.png: the first prompts, the first
seed, unchosen.
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import ROOT
from pack.models.attend_and_excite import Excitement, parse_thresholds
from pack.models.bootstrap import bootstrap, bootstrap_difference
from pack.models.measures import mean_by_group
from pack.training.base_model import load_base
from pack.training.following import ATTEND_AND_EXCITE, COMPOSABLE_DIFFUSION, PLAIN
from pack.training.generate import Job, Sampling, draw_pictures, noise_seed
from pack.training.pocket.attributes import FURS, HAT_COLOURS, HATS, METALS, NECKWEAR, PETS
from pack.training.pocket.captions import article
from pack.training.pocket.files import CHECKPOINT
from pack.training.pocket.measure import VALUES, read
from pack.training.pocket.shipped import load_judge

TITLES = {PLAIN: "plain", ATTEND_AND_EXCITE: "Attend-and-Excite", COMPOSABLE_DIFFUSION: "Composable Diffusion"}
SHOWN, SIDE, LABEL, HEAD, GAP = 12, (128, 128), 150, 24, 4


@dataclass(frozen=True)
class Pair:
    """A thing and its colour, and a kind and its; by which attributes the judge knows them."""

    thing: str
    other: str
    worn: dict[str, str]
    place: str
    kind: str
    colour: str
    surface: str


def pairs(count):
    """So many different prompts, each with the attributes that it names: of the thing, and of the animal."""
    colours = [(colour, other) for furs in (*[FURS] * len(PETS), METALS) for colour in furs for other in HAT_COLOURS]
    most = len((*NECKWEAR[1:], *HATS)) * sum(colour != other for colour, other in colours)
    if count > most:
        raise SystemExit(f"--prompts {count}: there are {most}.")
    rng, found = np.random.default_rng(17), {}
    while len(found) < count:
        kind = str(rng.choice((*PETS, "robot")))
        surface, colours = ("metal", METALS) if kind == "robot" else ("fur", FURS)
        colour, other = str(rng.choice(list(colours))), str(rng.choice(HAT_COLOURS))
        thing = str(rng.choice((*NECKWEAR[1:], *HATS)))
        worn = {"neckwear": thing} if thing in NECKWEAR else {"hat": thing, "hat_worn": "yes"}
        if colour != other:
            place = "neckwear_colour" if thing in NECKWEAR else "hat_colour"
            text = f"{article(f'{other} {thing}')} and {article(f'{colour} {kind}')}"
            found[text] = Pair(thing, other, worn, place, kind, colour, surface)
    return found


def jobs_of(folder, method, prompts, seeds, composition):
    jobs = []
    for i, (text, pair) in enumerate(prompts.items()):
        thing, animal = text.split(" and ")
        prompt = composition.format(whole=text, thing=thing, animal=animal) if method == COMPOSABLE_DIFFUSION else text
        for seed in range(seeds):
            path = folder / method / f"p{i:03}-s{seed}.png"
            jobs.append(Job(path, prompt, noise_seed(seed, i), excite=f'{pair.kind}, "{pair.thing}"'))
    return jobs


def counted(judge, paths, prompts, seeds):
    """Of each picture whether it shows both subjects, and whether each in its own colour."""
    pictures = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    (seen,) = read(judge, pictures)
    both, bound = [], []
    for i, pair in enumerate(pair for pair in prompts.values() for _ in range(seeds)):
        shown = {name: VALUES[name][numbers[i]] for name, numbers in seen.items()}
        both.append({"kind": pair.kind, **pair.worn}.items() <= shown.items())
        bound.append(both[-1] and {pair.surface: pair.colour, pair.place: pair.other}.items() <= shown.items())
    return torch.tensor(both).double(), torch.tensor(bound).double()


def sheet(folder, prompts, methods):
    font = ImageFont.load_default(size=12)
    texts = list(prompts)[:SHOWN]
    image = Image.new("RGB", (LABEL + len(methods) * (SIDE[0] + GAP), HEAD + len(texts) * (SIDE[1] + GAP)), "white")
    pen = ImageDraw.Draw(image)
    for column, method in enumerate(methods):
        pen.text((LABEL + column * (SIDE[0] + GAP), 5), TITLES[method], fill=(30, 30, 30), font=font)
    for row, text in enumerate(texts):
        y = HEAD + row * (SIDE[1] + GAP)
        pen.text((2, y + 48), text.replace(" and ", "\nand "), fill=(30, 30, 30), font=font)
        for column, method in enumerate(methods):
            picture = Image.open(folder / method / f"p{row:03}-s0.png").resize(SIDE, Image.Resampling.LANCZOS)
            image.paste(picture, (LABEL + column * (SIDE[0] + GAP), y))
    return image


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--methods", nargs="+", choices=tuple(TITLES), default=list(TITLES))
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=10, help="that Attend-and-Excite moves, of 20")
    parser.add_argument("--thresholds", default="", help="of the refinement")
    parser.add_argument("--scale", type=float, default=20.0)
    parser.add_argument("--sink", type=float, default=Excitement.sink)
    parser.add_argument("--composition", default="{whole} AND {animal} :0.5")
    arguments = parser.parse_args()
    excitement = Excitement(
        arguments.steps, parse_thresholds(arguments.thresholds), arguments.scale, sink=arguments.sink
    )
    sampling = Sampling(64, 20, arguments.guidance, 50, excitement=excitement)
    prompts = pairs(arguments.prompts)
    base, judge = load_base(str(ROOT / "models" / "pocket" / CHECKPOINT)), load_judge()
    base.pipeline.unet.requires_grad_(False)
    groups = torch.arange(len(prompts)).repeat_interleave(arguments.seeds)
    estimates, figures = {}, {}
    for method in arguments.methods:
        jobs = jobs_of(arguments.output, method, prompts, arguments.seeds, arguments.composition)
        draw_pictures(Accelerator(), base, jobs, replace(sampling, prompts=method), TITLES[method])
        hits_of = counted(judge, [job.path for job in jobs], prompts, arguments.seeds)
        for name, hits in zip(("both", "bound"), hits_of, strict=True):
            estimates[method, name] = found = bootstrap(list(prompts), mean_by_group(hits, groups), 2000)
            figures[f"{TITLES[method]}, {name}"] = [found.value, *found.interval]
    for method in arguments.methods[1:]:
        for name in ("both", "bound"):
            found = bootstrap_difference(estimates[method, name], estimates[arguments.methods[0], name])
            title = f"{TITLES[method]} - {TITLES[arguments.methods[0]]}, {name}"
            figures[title] = [found.value, *found.interval]
    for title, (value, low, high) in figures.items():
        print(f"{title}: {value:.1%} [{low:.1%}, {high:.1%}]")
    settings = {name: str(value) for name, value in vars(arguments).items() if name != "output"}
    (arguments.output / "figures.json").write_text(json.dumps({"figures": figures, "settings": settings}, indent=1))
    sheet(arguments.output, prompts, arguments.methods).save(arguments.output / "sheet.png")


if __name__ == "__main__":
    main()
