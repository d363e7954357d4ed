"""What a training measured: a log in JSON lines, a curve as a picture, and a tracker if wanted."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw
from tqdm import tqdm

from .shared import write_whole

SMOOTH = 0.95  # of the curve's running mean
COLOURS = {"loss": (200, 200, 205), "smooth": (36, 88, 180), "validation_loss": (214, 92, 40)}


@contextmanager
def untimed(bar: tqdm) -> Iterator[None]:
    """What is done here does not count for the time that a bar expects for what is left."""
    began = time.time()
    yield
    if not bar.disable:
        spent = time.time() - began
        bar.start_t += spent
        bar.last_print_t += spent


class Record:
    """The log of one training, `log.jsonl`; `begin` forgets what was logged after the step that it goes on from."""

    def __init__(self, folder: Path, start: int, accelerator: Accelerator | None = None):
        self.path, self.accelerator = folder / "log.jsonl", accelerator
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.lines = [line for line in map(_read, lines) if line is not None and line["step"] <= start]

    def begin(self) -> None:
        """Write what stays of the log before."""
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in self.lines).encode())

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures after `step` steps."""
        line = {"step": step, **figures}
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.accelerator is not None and self.accelerator.trackers:
            self.accelerator.log(dict(figures), step=step)

    def shown(self) -> dict[str, str]:
        """For the progress bar: the mean of the last losses, and the rate."""
        losses = [line["loss"] for line in self.lines[-50:] if "loss" in line]
        rate = next((line["lr"] for line in reversed(self.lines) if "lr" in line), 0.0)
        return {"loss": f"{sum(losses) / max(len(losses), 1):.4f}", "lr": f"{rate:.1e}"}

    def draw(self, path: Path) -> None:
        """The losses over the steps, as a PNG."""
        points = {name: [(x["step"], x[name]) for x in self.lines if name in x] for name in ("loss", "validation_loss")}
        if not points["loss"]:
            return
        smooth, mean = [], points["loss"][0][1]
        for step, loss in points["loss"]:
            mean = SMOOTH * mean + (1 - SMOOTH) * loss
            smooth.append((step, mean))
        points = {"loss": points["loss"], "smooth": smooth, "validation_loss": points["validation_loss"]}
        width, height, left, bottom, top = 900, 420, 70, 40, 24
        values = sorted(value for line in points.values() for _, value in line)
        low, high = values[0], values[min(len(values) - 1, int(len(values) * 0.99))]
        high = high if high > low else low + 1e-6
        last = max(points["loss"][-1][0], 2)
        image = Image.new("RGB", (width, height), "white")
        pen = ImageDraw.Draw(image)

        def at(step: float, value: float) -> tuple[float, float]:
            x = left + (step - 1) / (last - 1) * (width - left - 20)
            y = height - bottom - (min(value, high) - low) / (high - low) * (height - bottom - top)
            return x, y

        for i in range(5):
            value = low + (high - low) * i / 4
            pen.line([at(1, value), at(last, value)], fill=(235, 235, 235))
            pen.text((8, at(1, value)[1] - 6), f"{value:.4f}", fill=(90, 90, 90))
            step = 1 + (last - 1) * i / 4
            pen.text((at(step, low)[0] - 12, height - bottom + 10), f"{step:.0f}", fill=(90, 90, 90))
        for name, line in points.items():
            if len(line) > 1:
                pen.line([at(*point) for point in line], fill=COLOURS[name], width=1 if name == "loss" else 2)
        pen.text(
            (left, 4), "loss (grey), its running mean (blue), validation loss (orange), over steps", fill=(60, 60, 60)
        )
        image.save(path)


def _read(text: str) -> dict | None:
    """A line of the log; None for one that was cut off, or is none."""
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def memory() -> float:
    """In GB: the most of the accelerator's that was used so far, or what the process uses."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return psutil.Process().memory_info().rss / 1e9
