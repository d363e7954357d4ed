"""Where the pocket subjects of a picture are, by kind: a small network that learns it from the generator's own masks."""

import itertools

import numpy as np
import torch
from pack.training.pocket.attributes import KINDS
from pack.training.pocket.draw import draw
from pack.training.pocket.subject_set import SEEN, subject_scene
from pack.training.pocket.vae import to_tensor
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

FIRST, SCENES, STEPS, BATCH = 8_000_000, 4000, 1000, 24
WIDTHS = (3, 32, 64, 128)
EDGE = 0.01
"""Share of a subject's pixels on each side that its box may leave out."""


class Finder(nn.Module):
    """[n, 3, h, w] in -1..1 -> logits [n, 7, h, w]: nobody, or a subject of which kind."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in itertools.pairwise(WIDTHS))
        self.up = nn.ModuleList(nn.Conv2d(a + b, b, 3, 1, 1) for a, b in ((128, 64), (64, 32)))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in WIDTHS[1:])
        self.wide = nn.Conv2d(128, 128, 3, 1, 2, dilation=2)
        self.out = nn.Conv2d(32, 1 + len(KINDS), 1)

    def forward(self, pictures):
        x, seen = pictures, []
        for convolution, norm in zip(self.down, self.norms, strict=True):
            x = F.relu(norm(convolution(x)))
            seen.append(x)
        x = x + F.relu(self.wide(x)) + x.mean((2, 3), keepdim=True)
        for convolution, before in zip(self.up, reversed(seen[:-1]), strict=True):
            x = F.relu(convolution(torch.cat([F.interpolate(x, before.shape[2:]), before], 1)))
        return F.interpolate(self.out(x), pictures.shape[2:], mode="bilinear")


def labelled(number):
    """Picture [h, w, 3] and labels [h, w] of scene `number`."""
    scene, masks = subject_scene(number), []
    picture = np.asarray(draw(scene, masks))
    labels = np.zeros(picture.shape[:2], np.int64)
    for subject, mask in zip(scene.subjects, masks, strict=True):
        labels[np.asarray(mask) >= SEEN] = 1 + KINDS.index(subject.identity.kind)
    return picture, labels


def find_with(path):
    """A trained finder, which is trained and kept at `path` the first time."""
    finder = Finder()
    if path.exists():
        finder.load_state_dict(load_file(path))
        return finder.eval()
    torch.manual_seed(0)
    rng, scenes = np.random.default_rng(0), [labelled(FIRST + i) for i in tqdm(range(SCENES), desc="Drawing")]
    pictures = to_tensor(np.stack([picture for picture, _ in scenes]))
    labels = torch.from_numpy(np.stack([labels for _, labels in scenes]))
    optimizer = torch.optim.AdamW(finder.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
    for _ in tqdm(range(STEPS), desc="Learning to find"):
        rows = rng.choice(SCENES, BATCH, replace=False)
        x = pictures[rows]
        x = torch.lerp(x, F.avg_pool2d(x, 3, 1, 1), torch.rand(BATCH, 1, 1, 1) * 0.6)  # as a decoder blurs them
        loss = F.cross_entropy(finder(x + 0.05 * torch.randn_like(x) * torch.rand(BATCH, 1, 1, 1)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(finder.state_dict(), path)
    return finder.eval()


@torch.no_grad()
def find(finder, picture, kind):
    """Box (left, top, right, bottom, as shares) of the subject of a kind in a picture [h, w, 3]; None where there is none."""
    is_it = (finder(to_tensor(picture[None]))[0].argmax(0) == 1 + KINDS.index(kind)).numpy()
    if is_it.sum() < 20:
        return None
    sides = []
    for axis in (1, 0):
        share = np.cumsum(is_it.sum(axis)) / is_it.sum()
        sides.append((np.searchsorted(share, EDGE), np.searchsorted(share, 1 - EDGE) + 1))
    (top, bottom), (left, right) = sides
    height, width = is_it.shape
    return left / width, top / height, right / width, bottom / height
