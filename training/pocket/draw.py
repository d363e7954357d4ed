"""A scene as a picture, with the silhouette of each subject where it is wanted."""

import numpy as np
from PIL import Image

from .attributes import Scene
from .pen import INK, SUPERSAMPLING, Pen
from .scenery import draw_background, draw_obstacle, draw_poster, finish
from .subjects import draw_subject

SCALES = {"close-up": 19.5, "portrait": 15.5, "half-length": 12.5}
HEIGHTS = {"close-up": 38.0, "portrait": 33.0, "half-length": 27.5}


def draw(scene: Scene, masks: list[Image.Image] | None = None) -> Image.Image:
    """[height, width] RGB picture of the scene; appends each subject's mask (L, 0 to 255) to `masks`."""
    width, height = scene.size
    rng = np.random.default_rng(scene.seed)
    canvas = Image.new("RGB", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    ink = INK if scene.style == "comic" else None
    factor = height / 64
    pixels = Pen(canvas, scale=factor, ink=ink, stroke=factor)
    across = round(width / factor)
    draw_background(pixels, scene.background, across, rng)
    poster = scene.logo if scene.logo is not None and scene.logo.place == "wall" else None
    side = -1 if rng.random() < 0.5 else 1
    if poster is not None:
        draw_poster(pixels, poster, side, across)
    for i, subject in enumerate(scene.subjects):
        scale, y = SCALES[scene.framing], HEIGHTS[scene.framing]
        x = across / 2 + rng.uniform(-3, 3)
        if len(scene.subjects) > 1:
            scale, y = 13.5, 32.0
            x = across * (0.27 + 0.46 * i) + rng.uniform(-1.5, 1.5)
        elif poster is not None:
            x = across / 2 - side * 6
        if scene.places is not None:
            scale, y, x = 13.5, 32.0, across * scene.places[i]
        scale, y = scale * rng.uniform(0.95, 1.05), y + rng.uniform(-1.5, 1.5)
        mask = None if masks is None else Image.new("L", canvas.size)
        logo = scene.logo if scene.logo is not None and scene.logo.place == "shirt" else None
        pen = Pen(canvas, (x * factor, y * factor), scale * factor, ink, mask, factor)
        draw_subject(pen, subject, logo)
        if masks is not None and mask is not None:
            masks.append(mask.reduce(SUPERSAMPLING))
    if scene.obstacle != "none":
        draw_obstacle(pixels, scene.obstacle, scene.logo, across, rng)
    return finish(canvas, scene.light, scene.style)
