"""Subject-Diffusion on pocket subjects that it has never seen, alone and in pairs, counted by the judge.

    python tests/benchmarks/subjects.py --output FOLDER --files WHOLE.safetensors [ANOTHER.safetensors ...] [--count 60]
        [--seeds 2]

The first file is the one that is asked about; from each of the others, mostly trained without a part, it is subtracted. Each
scene (96 x 64 pixels, of one subject or two, anywhere) is drawn from what the generator's own has: its caption, which says
what varies and of each subject the kind, a crop of another drawing of each subject, and its true box. 20 steps of
Euler's method, the same noise for all. Counted are

- identity: attributes of the subject that the picture can show, read as its own, the kind not counted, which the caption says;
- likeness: cosine of the judge's identity features;
- placed: subjects whose box overlaps the one that was asked for by half (intersection over union); overlap: by how much;
- prompt: what the caption says of poses, expressions, hats, background and light;
- two only: both, pictures in which two thirds of each one's identity are right; unmixed, in which what is in each box is
  liker to its own subject than to the other.

Beside the files stand "words alone", the base without Subject-Diffusion, and "the truth", the generator's own drawings.
Where a subject is, is told by a network that the folder's first run trains on the generator's masks (finder.py; "the truth" shows how
well it does); what it looks like is read in the 64 columns around. The intervals (95 %) draw scenes again. The folder keeps
the pictures (a second run draws what is missing), figures.json and a sheet of the first scenes, the first seed, unchosen.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import ROOT
from finder import find, find_with
from pack.models.bootstrap import bootstrap, bootstrap_difference
from pack.models.measures import mean_by_group
from pack.models.pictures import box_of
from pack.models.subject_diffusion import IMAGE_SCALE
from pack.training.base_model import load_base
from pack.training.generate import Job, Sampling, draw_pictures, noise_seed
from pack.training.image_encoder import load_image_encoder
from pack.training.pocket.attributes import Scene
from pack.training.pocket.draw import draw
from pack.training.pocket.files import CHECKPOINT, IMAGE_ENCODER
from pack.training.pocket.judge import NAMES
from pack.training.pocket.measure import VALUES
from pack.training.pocket.shipped import load_judge
from pack.training.pocket.subject_set import SEEN, reference, subject_caption, subject_scene
from pack.training.pocket.vae import to_tensor
from pack.training.subject_drawing import Placed, SubjectArtist, SubjectJob
from shown import own_values, own_vectors
from torchvision.ops import box_iou

WORDS, TRUTH = "words alone", "the truth"
FIRST = 5_000_000  # of the scenes: no data set has them
HEIGHT, WIDTH, WINDOW = 64, 96, 64
NEAR, KNOWN = 0.5, 2 / 3
ONE, TWO = "one subject", "two subjects"
MEASURES = {ONE: ("identity", "likeness", "placed", "overlap", "prompt")}
MEASURES[TWO] = (*MEASURES[ONE], "both", "unmixed")
SHOWN, SIDE, HEAD, GAP = 8, (144, 96), 24, 4


@dataclass(frozen=True)
class Case:
    """A scene to draw, and what is asked of it."""

    number: int
    scene: Scene
    text: str
    truth: np.ndarray
    boxes: tuple[tuple[float, float, float, float], ...]
    crops: tuple[Path, ...]


def cases(folder, count):
    """So many scenes of one subject, and of two; their crops are written."""
    found, number = {ONE: [], TWO: []}, FIRST
    while min(map(len, found.values())) < count:
        scene, masks = subject_scene(number), []
        kind = ONE if len(scene.subjects) == 1 else TWO
        if len(found[kind]) < count:
            truth = np.asarray(draw(scene, masks))
            crops = tuple(folder / "crops" / f"{number}-{i}.png" for i in range(len(masks)))
            for i, (path, subject) in enumerate(zip(crops, scene.subjects, strict=True)):
                path.parent.mkdir(parents=True, exist_ok=True)
                reference(subject.identity, number + i * 10_000_000).save(path)
            boxes = tuple(shares_of(np.asarray(mask) >= SEEN) for mask in masks)
            found[kind].append(Case(number, scene, subject_caption(scene, number), truth, boxes, crops))
        number += 1
    return found


def shares_of(mask):
    """The box around what is true, as shares."""
    left, top, right, bottom = box_of(torch.from_numpy(mask))
    return left / WIDTH, top / HEIGHT, right / WIDTH, bottom / HEIGHT


def jobs_of(folder, some, seeds):
    jobs = []
    for case in some:
        kinds = (subject.identity.kind for subject in case.scene.subjects)
        placed = tuple(Placed(*one) for one in zip(case.crops, kinds, case.boxes, strict=True))
        for seed in range(seeds):
            path = folder / f"{case.number}-s{seed}.png"
            jobs.append(SubjectJob(path, case.text, noise_seed(seed, case.number), placed))
    return jobs


def drawn(folder, method, some, seeds, sampling, image_scale):
    """Pictures [n, 64, 96, 3] of each case and seed; `method` is a file, WORDS or TRUTH."""
    if method == TRUTH:
        return np.repeat(np.stack([case.truth for case in some]), seeds, 0)
    base = load_base(str(ROOT / "models" / "pocket" / CHECKPOINT))
    jobs = jobs_of(folder / (method if method == WORDS else method.stem), some, seeds)
    if method == WORDS:
        plain = [Job(job.path, job.prompt, job.seed) for job in jobs]
        draw_pictures(Accelerator(), base, plain, sampling, WORDS)
    else:
        artist = SubjectArtist(base, method, load_image_encoder(ROOT / "models" / "pocket" / IMAGE_ENCODER))
        artist.draw(Accelerator(), jobs, sampling, method.stem, image_scale)
    return np.stack([np.asarray(Image.open(job.path).convert("RGB")) for job in jobs])


@torch.no_grad()
def seen_in(judge, picture, box):
    """What the judge sees around a box: the value of each attribute, and the identity features [64]."""
    around = F.pad(to_tensor(picture[None]), (WINDOW // 2,) * 2 + (0, 0), mode="replicate")
    middle = round((box[0] + box[2]) / 2 * WIDTH)
    logits, vectors = judge(around[..., middle : middle + WINDOW])
    return {name: VALUES[name][int(found.argmax())] for name, found in zip(NAMES, logits, strict=True)}, vectors[0]


def counted(judge, finder, pictures, some, seeds):
    """[n, measures] of pictures, in the order of MEASURES."""
    rows = []
    for number, case in enumerate(some):
        whose = [own_vectors(judge, subject.identity) for subject in case.scene.subjects]
        for picture in pictures[number * seeds : (number + 1) * seeds]:
            rows.append(measured(judge, finder, picture, case, whose))
    return torch.tensor(rows, dtype=torch.double)


def measured(judge, finder, picture, case, whose):
    """A row of measures."""
    shares, likenesses, overlaps, said, nearer = [], [], [], [], []
    for i, (subject, box) in enumerate(zip(case.scene.subjects, case.boxes, strict=True)):
        asked = subject.values()
        found = find(finder, picture, subject.identity.kind)
        shown, vector = seen_in(judge, picture, found or box)
        boxed = seen_in(judge, picture, box)[1]
        own = own_values(subject.identity, shown).items()
        shares.append(np.mean([shown[name] == value for name, value in own if name != "kind"]))
        likenesses.append(float(vector @ whose[i]))
        overlaps.append(0.0 if found is None else float(box_iou(torch.tensor([found]), torch.tensor([box]))))
        names = ["pose", "expression"] + ["hat_worn"] * (asked["hat_worn"] == "yes")
        said += [shown[name] == asked[name] for name in names]
        around = {"background": case.scene.background, "light": case.scene.light}
        around = {name: value for name, value in around.items() if value != "daylight"}
        said += [shown[name] == value for name, value in around.items()]
        nearer.append(all(boxed @ (whose[i] - whose[k]) > 0 for k in range(len(whose)) if k != i))
    row = [np.mean(shares), np.mean(likenesses), np.mean(np.array(overlaps) >= NEAR), np.mean(overlaps), np.mean(said)]
    return row if len(whose) == 1 else [*row, float(min(shares) >= KNOWN), float(all(nearer))]


def sheet(pictures, some, methods, seeds):
    """Of the first scenes their crops, and a picture of each method."""
    font = ImageFont.load_default(size=12)
    wide, high = SIDE
    image = Image.new("RGB", (2 * (high + GAP) + len(methods) * (wide + GAP), HEAD + SHOWN * (high + GAP)), "white")
    pen = ImageDraw.Draw(image)
    for column, method in enumerate(methods):
        x = 2 * (high + GAP) + column * (wide + GAP)
        pen.text((x, 5), method, fill=(30, 30, 30), font=font)
        for row, case in enumerate(some[:SHOWN]):
            y = HEAD + row * (high + GAP)
            picture = Image.fromarray(pictures[method][row * seeds]).resize(SIDE, Image.Resampling.NEAREST)
            frame = ImageDraw.Draw(picture)
            for (left, top, right, bottom), colour in zip(case.boxes, ((255, 0, 0), (0, 0, 255)), strict=False):
                frame.rectangle((left * wide, top * high, right * wide - 1, bottom * high - 1), outline=colour)
            image.paste(picture, (x, y))
            for i, path in enumerate(case.crops):
                crop = Image.open(path).convert("RGBA").resize((high, high))
                image.paste(crop, (i * (high + GAP), y), crop)
    return image


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--files", type=Path, nargs="+", required=True)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--guidance", type=float, default=4.0, help="s_t")
    parser.add_argument("--image_scale", type=float, default=IMAGE_SCALE, help="s_i")
    arguments = parser.parse_args()
    sampling, judge, figures = Sampling(HEIGHT, 20, arguments.guidance, width=WIDTH), load_judge(), {}
    finder = find_with(arguments.output / "finder.safetensors")
    methods = {path.stem: path for path in arguments.files} | {WORDS: WORDS, TRUTH: TRUTH}
    first = arguments.files[0].stem
    for kind, some in cases(arguments.output, arguments.count).items():
        names = [str(case.number) for case in some]
        groups = torch.arange(len(some)).repeat_interleave(arguments.seeds)
        pictures, found = {}, {}
        for name, method in methods.items():
            pictures[name] = drawn(arguments.output, method, some, arguments.seeds, sampling, arguments.image_scale)
            rows = counted(judge, finder, pictures[name], some, arguments.seeds)
            for column, what in enumerate(MEASURES[kind]):
                found[name, what] = bootstrap(names, mean_by_group(rows[:, column], groups), 2000)
                figures[f"{kind}, {name}, {what}"] = [found[name, what].value, *found[name, what].interval]
                if name not in (first, WORDS, TRUTH):
                    less = bootstrap_difference(found[name, what], found[first, what])
                    figures[f"{kind}, {name} - {first}, {what}"] = [less.value, *less.interval]
        sheet(pictures, some, list(methods), arguments.seeds).save(arguments.output / f"{kind}.png")
    for title, (value, low, high) in figures.items():
        print(f"{title}: {value:.3f} [{low:.3f}, {high:.3f}]")
    (arguments.output / "figures.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
