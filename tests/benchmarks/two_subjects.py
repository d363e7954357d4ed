"""Prompts of two subjects on the pocket model: plain, with Attend-and-Excite, and composed; counted by the judge.

    python tests/benchmarks/two_subjects.py --output FOLDER [--prompts 200] [--seeds 4] [--guidance 1]

A prompt names two subjects of different kinds, each with a colour of its own ("a golden robot and a woman in a purple
shirt"), 96 x 64 pixels, 20 steps of Euler's method, the same noise for all methods. Without classifier-free guidance
(the default, as distilled models are sampled) the model forgets a subject in one of seven pictures; with 4 it forgets hardly
any, and only colours go astray. Counted are, in the left and in the right half, in either order:

- both: pictures that show both subjects;
- bound: pictures that show both, each in its own colour.

The intervals (95 %) draw prompts again. Attend-and-Excite excites the two subjects, as in the paper; Composable Diffusion
gets the prompt, and takes away what the colours would be exchanged. The folder keeps pictures (a second run draws what is missing), figures.json
and sheet.png: the first prompts, the first seed, unchosen.
"""

import argparse
import itertools
import json
import sys
from dataclasses import replace
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
from pack.training.generate import Job, Sampling, draw_pictures
from pack.training.pocket.attributes import COLOURS, FURS, KINDS, METALS, PEOPLE
from pack.training.pocket.files import CHECKPOINT
from pack.training.pocket.measure import VALUES, read
from pack.training.pocket.shipped import load_judge

TITLES = {PLAIN: "plain", ATTEND_AND_EXCITE: "Attend-and-Excite", COMPOSABLE_DIFFUSION: "Composable Diffusion"}
SHOWN, SIDE, LABEL, HEAD, GAP = 12, (144, 96), 150, 24, 4


def colour_of(kind):
    """Which attribute of a kind is its colour, and its values."""
    if kind in PEOPLE:
        return "clothes", tuple(COLOURS)
    return ("metal", tuple(METALS)) if kind == "robot" else ("fur", tuple(FURS))


def phrase_of(subject):
    kind, colour = subject["kind"], next(value for name, value in subject.items() if name != "kind")
    coloured = f"{'an' if colour[0] in 'aeiou' else 'a'} {colour}"
    return f"a {kind} in {coloured} shirt" if kind in PEOPLE else f"{coloured} {kind}"


def recoloured(subject, other):
    """With the other's colour."""
    kind, colour = subject["kind"], list(other.values())[1]
    return {"kind": kind, colour_of(kind)[0]: colour}


def pairs(count):
    """So many different pairs of subjects, by the attributes that name them."""
    rng, found = np.random.default_rng(17), {}
    while len(found) < count:
        both = []
        for kind in rng.choice(KINDS, size=2, replace=False):
            name, values = colour_of(kind)
            both.append({"kind": str(kind), name: str(rng.choice(values))})
        first, second = (list(subject.values())[1] for subject in both)
        if first != second:
            found[" and ".join(map(phrase_of, both))] = both
    return found


def jobs_of(folder, method, prompts, seeds, composition):
    jobs = []
    for i, (text, both) in enumerate(prompts.items()):
        one, other = both
        parts = {"whole": text, "first": phrase_of(one), "second": phrase_of(other)}
        parts["exchanged"] = f"{phrase_of(recoloured(one, other))} and {phrase_of(recoloured(other, one))}"
        prompt = composition.format(**parts) if method == COMPOSABLE_DIFFUSION else text
        words = ", ".join(subject["kind"] for subject in both)
        for seed in range(seeds):
            path = folder / method / f"p{i:03}-s{seed}.png"
            jobs.append(Job(path, prompt, seed * 1_000_003 + i, excite=words))
    return jobs


@torch.no_grad()
def counted(judge, paths, prompts, seeds):
    """Of each picture whether it shows both subjects, and whether each in its own colour."""
    pictures = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    halves = read(judge, pictures)
    both, bound = [], []
    for i, (_, subjects) in enumerate(pair for pair in prompts.items() for _ in range(seeds)):
        there, coloured = [], []
        for order in itertools.permutations(subjects):
            hits = [
                {name: VALUES[name][half[name][i]] == value for name, value in subject.items()}
                for subject, half in zip(order, halves, strict=True)
            ]
            there.append(all(hit["kind"] for hit in hits))
            coloured.append(all(all(hit.values()) for hit in hits))
        both.append(any(there))
        bound.append(any(coloured))
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
        pen.text((2, y + 24), text.replace(" and ", "\nand ").replace(" in ", "\nin "), fill=(30, 30, 30), font=font)
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
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=10, help="that Attend-and-Excite moves, of 20")
    parser.add_argument("--thresholds", default="0:0.05, 4:0.5, 8:0.8")
    parser.add_argument("--scale", type=float, default=20.0)
    parser.add_argument("--sink", type=float, default=Excitement.sink)
    parser.add_argument("--composition", default="{whole} :2 AND NOT {exchanged} :1")
    arguments = parser.parse_args()
    excitement = Excitement(
        arguments.steps, parse_thresholds(arguments.thresholds), arguments.scale, sink=arguments.sink
    )
    sampling = Sampling(64, 20, arguments.guidance, 50, width=96, excitement=excitement)
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
