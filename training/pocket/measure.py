"""What the pocket model can do, counted: on fresh captions, pictures and identities, by the judge and the truth."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric

from ..diffusers_attention import apply_image_prompts
from ..shared import POCKET, IPAdapter, References, read_ip_adapter
from .attributes import SUBJECT_VALUES, VALUES, hidden_by_hat, sample_scene
from .captions import Caption, caption
from .data import VALIDATION, Pictures, identity, scene
from .draw import draw
from .encoders import VISION
from .files import ADAPTER
from .judge import NAMES, Judge, Windows, count_right, windows
from .shipped import BATCH, Pocket, load_pocket
from .vae import mean_psnr, to_tensor

FRESH, OTHERS = 3, 5  # seeds that no training, validation or set of photographs uses


@torch.no_grad()
def read(judge: Judge, pictures: np.ndarray) -> list[dict[str, np.ndarray]]:
    """What the judge sees in each window of pictures [n, h, w, 3]: for each attribute the numbers [n] of its values."""
    seen: list[list[Tensor]] = []
    for start in range(0, len(pictures), 200):
        for i, window in enumerate(windows(to_tensor(pictures[start : start + 200]))):
            seen += [[]] * (i == len(seen))
            seen[i] = [*seen[i], torch.stack([logits.argmax(1) for logits in judge(window)[0]])]
    return [dict(zip(NAMES, torch.cat(parts, 1).numpy(), strict=True)) for parts in seen]


def fresh_captions(count: int, subjects: int) -> list[Caption]:
    """Captions of scenes that were never drawn, all of so many subjects."""
    captions = []
    for i in range(count):
        rng = np.random.default_rng([FRESH, 10 + subjects, i])
        captions.append(caption(sample_scene(rng, pairs=float(subjects - 1)), rng))
    return captions


def following(pocket: Pocket, count: int) -> tuple[Counter, Counter]:
    """Named attributes that the pictures show, and all that were named: by attribute, for single and for two."""
    right: Counter[str] = Counter()
    named: Counter[str] = Counter()
    for subjects, share, width in ((1, 0.7, 64), (2, 0.3, 96)):
        captions = fresh_captions(round(count * share), subjects)
        seen = read(pocket.judge, pocket.generate([words.text for words in captions], width, seed=subjects))
        for i, words in enumerate(captions):
            both: list[bool] = []
            for subject, around in zip(words.subjects, [words.scene] + [{}] * (subjects - 1), strict=True):
                window = seen[len(both)]
                for name, value in {**subject, **around}.items():
                    hit = VALUES[name][window[name][i]] == value
                    key = name if subjects == 1 else f"two subjects, {name}"
                    named[key] += 1
                    right[key] += hit
                both.append(VALUES["kind"][window["kind"][i]] == subject.get("kind"))
            if subjects == 2 and all("kind" in subject for subject in words.subjects):
                named["two subjects, both kinds"] += 1
                right["two subjects, both kinds"] += all(both)
    return right, named


@torch.no_grad()
def judged(judge: Judge, pictures: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Features [n, 160] of all windows, and logits [n, 72] of kind and background together."""
    features = [
        judge.features(window)
        for array in pictures
        for start in range(0, len(array), 200)
        for window in windows(to_tensor(array[start : start + 200]))
    ]
    joined = torch.cat(features)
    logits = dict(zip(NAMES, judge.read(joined), strict=True))
    kind, background = (logits[name].log_softmax(1) for name in ("kind", "background"))
    return joined, (kind[:, :, None] + background[:, None, :]).flatten(1)


def fidelity(pocket: Pocket, folder: Path, generated: int, real: int) -> dict[str, float]:
    """FID and IS with the judge's features, of generated pictures and, for comparison, of as many real ones."""
    prompts = [[words.text for words in fresh_captions(round(generated * s), n)] for n, s in ((1, 0.7), (2, 0.3))]
    made = [pocket.generate(texts, width, seed=9) for texts, width in zip(prompts, (64, 96), strict=True)]
    others, reference = Pictures(folder, OTHERS, generated), Pictures(folder, FRESH, real)
    statistics, scores = {}, {}
    for name, arrays in {
        "generated": made,
        "real": [others.single, others.pair],
        "reference": [reference.single, reference.pair],
    }.items():
        features, logits = judged(pocket.judge, arrays)
        statistics[name] = fid_features_to_statistics(features)
        scores[f"IS, {name}"] = isc_features_to_metric(logits)["inception_score_mean"]
    for name in ("generated", "real"):
        distance = fid_statistics_to_metric(statistics[name], statistics["reference"], False)
        scores[f"FID, {name} to {real} fresh"] = distance["frechet_inception_distance"]
    return scores


def retrieval(pocket: Pocket, count: int) -> dict[str, float]:
    """Share of pictures whose nearest caption is their own, and the reverse, and whose nearest picture shows the same
    identity, among `count` fresh identities with two pictures each."""
    pictures, others, texts = [], [], []
    for i in range(count):
        rng, who = np.random.default_rng([FRESH, 9, i]), (identity(FRESH, i),)
        first, second = sample_scene(rng, who), sample_scene(rng, who)
        pictures.append(np.asarray(draw(first)))
        others.append(np.asarray(draw(second)))
        texts.append(caption(first, rng).text)
    a, b = (normalize(pocket.embed(np.stack(p)), dim=1) for p in (pictures, others))
    t = normalize(pocket.embed_text(texts), dim=1)
    own = torch.arange(count)

    def top(similarity: Tensor, k: int) -> float:
        return (similarity.topk(k).indices == own[:, None]).any(1).float().mean().item()

    scores: dict[str, float] = {}
    for name, similarity in {"image to text": a @ t.T, "text to image": t @ a.T, "image to image": a @ b.T}.items():
        scores |= {f"{name}, first of {count}": top(similarity, 1), f"{name}, in the first 5": top(similarity, 5)}
    return scores | {"chance, first": 1 / count, "chance, in the first 5": 5 / count}


@torch.no_grad()
def likeness(pocket: Pocket, adapter: IPAdapter, count: int, weights: tuple[float, ...]) -> dict[str, dict[str, float]]:
    """With one reference and no prompt: for each lambda, how often an attribute of the picture is the reference's.

    An attribute counts where both show it: a hat is worn or not as it happens, and hides the hair. "likeness" is the mean
    cosine of the judge's identity features. At lambda 0 the figures are those of chance.
    """
    scenes = [scene(VALIDATION, 4 * i, pairs=0.0) for i in range(count)]
    references = np.stack([np.asarray(draw(picture)) for picture in scenes])
    embedded = pocket.embed(references)
    unet, scores = pocket.pipeline.unet, dict[str, dict[str, float]]()
    own = pocket.judge(to_tensor(references))[1]
    patches = torch.zeros(1, (VISION.image_size // VISION.patch_size) ** 2 + 1, VISION.hidden_size)  # not used by it
    given = [References(embedded[i : i + 1], patches, patches[0], torch.ones(1), ("",)) for i in range(count)]
    shown = [adapter.image_prompt(one, "average") for one in given]
    for weight in weights:
        pictures = []
        for start in range(0, count, BATCH):
            some = shown[start : start + BATCH]
            before = apply_image_prompts(unet, [adapter.empty_prompt(given[0])] * len(some) + some, weight)
            pictures.append(pocket.generate([""] * len(some), seed=50 + start))
            unet.set_attn_processor(dict(before))
        array = np.concatenate(pictures)
        seen, who = read(pocket.judge, array)[0], pocket.judge(to_tensor(array))[1]
        right: Counter[str] = Counter()
        of: Counter[str] = Counter()
        for i, picture in enumerate(scenes):
            hidden = hidden_by_hat(SUBJECT_VALUES["hat_worn"][seen["hat_worn"][i]] == "yes")
            for name, value in picture.subject_values()[0].items():
                if name in hidden:
                    continue
                of[name] += 1
                right[name] += SUBJECT_VALUES[name][seen[name][i]] == value
        scores[f"{weight:g}"] = {name: right[name] / of[name] for name in of} | {
            "likeness": (own * who).sum(1).mean().item()
        }
    return scores


def measure(folder: Path, weights: Path = POCKET, count: int = 1000, generated: int = 5000, real: int = 10000) -> None:
    """Every figure of the model card, printed; `folder` keeps the pictures that it draws."""
    pocket = load_pocket(weights)
    fresh = Windows(folder, VALIDATION, 4000)
    print(f"VAE: {mean_psnr(pocket.pipeline.vae, Pictures(folder, VALIDATION, 500)):.2f} dB")
    for name, (right, of) in count_right(pocket.judge, fresh).items():
        print(f"judge, {name}: {right / of:.2%} of {of}")
    hits, named = following(pocket, count)
    for name in named:
        print(f"prompt, {name}: {hits[name] / named[name]:.1%} of {named[name]}")
    for name, value in (retrieval(pocket, count) | fidelity(pocket, folder, generated, real)).items():
        print(f"{name}: {value:.4g}")
    adapter = IPAdapter.from_state(read_ip_adapter(weights / ADAPTER))
    for references, weights_given in ((300, (0.0, 0.25, 0.5, 0.75, 1.0)), (1000, (0.0, 1.0))):
        for weight, scores in likeness(pocket, adapter, references, weights_given).items():
            shares = ", ".join(f"{name} {value:.0%}" for name, value in scores.items())
            print(f"{references} references, lambda {weight}: {shares}")
