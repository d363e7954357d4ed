"""What is behind and before the subjects, the light, and the styles."""

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from .attributes import BACKGROUND_COLOURS, Logo
from .logos import draw_logo
from .pen import SUPERSAMPLING, WHITE, Pen, shade

TINTS = {"daylight": (1.0, 1.0, 1.0), "warm": (1.08, 0.95, 0.76), "cool": (0.8, 0.92, 1.1)}


def draw_background(pen: Pen, background: str, width: int, rng: np.random.Generator) -> None:
    """Fill the whole picture; `pen` is in pixels of a picture 64 high."""
    if background in BACKGROUND_COLOURS:
        colour = BACKGROUND_COLOURS[background]
        pen.rectangle(-2, -2, width + 2, 70, colour)
        pen.ellipse(width / 2, 30 + rng.uniform(-4, 4), width * 0.42, 27, shade(colour, 1.35), outlined=False)
        return
    {"beach": _beach, "forest": _forest, "city": _city, "mountains": _mountains, "space": _space, "library": _library}[
        background
    ](pen, width, rng)


def _beach(pen: Pen, width: int, rng: np.random.Generator) -> None:
    pen.rectangle(-2, -2, width + 2, 40, (160, 216, 248))
    pen.ellipse(rng.uniform(6, width - 6), rng.uniform(7, 12), 6, 6, (255, 232, 90))
    pen.rectangle(-2, 30, width + 2, 48, (38, 128, 196))
    pen.rectangle(-2, 44, width + 2, 70, (240, 214, 150))


def _forest(pen: Pen, width: int, rng: np.random.Generator) -> None:
    pen.rectangle(-2, -2, width + 2, 70, (196, 226, 190))
    shift = rng.uniform(0, 16)
    for i in range(-1, width // 16 + 2):
        x = i * 16 + shift
        pen.rectangle(x - 2, 34, x + 2, 60, (98, 66, 40))
        pen.polygon([(x - 10, 44), (x, 4 + 6 * (i % 2)), (x + 10, 44)], (34, 104 + 18 * (i % 2), 58))
    pen.rectangle(-2, 54, width + 2, 70, (86, 148, 74))


def _city(pen: Pen, width: int, rng: np.random.Generator) -> None:
    pen.rectangle(-2, -2, width + 2, 70, (206, 214, 228))
    shift = rng.uniform(0, 17)
    for i in range(-1, width // 17 + 2):
        left, top = i * 17 + shift, 8 + 11 * ((i * 7 + 3) % 3)
        pen.rectangle(left, top, left + 15, 70, (92, 100, 124) if i % 2 else (128, 108, 110))
        for row in range(4):
            for column in range(2):
                y = top + 4 + row * 9
                pen.rectangle(left + 2.5 + column * 6, y, left + 6.5 + column * 6, y + 5, (250, 224, 120))


def _mountains(pen: Pen, width: int, rng: np.random.Generator) -> None:
    pen.rectangle(-2, -2, width + 2, 70, (178, 208, 236))
    shift = rng.uniform(-8, 8)
    for i in range(-1, width // 30 + 2):
        x = i * 30 + shift
        pen.polygon([(x - 24, 58), (x, 8 + 5 * (i % 2)), (x + 24, 58)], (110, 122, 150))
        top = 8 + 5 * (i % 2)
        pen.polygon([(x - 8, top + 17), (x, top), (x + 8, top + 17), (x, top + 12)], WHITE)
    pen.rectangle(-2, 52, width + 2, 70, (244, 247, 252))


def _space(pen: Pen, width: int, rng: np.random.Generator) -> None:
    pen.rectangle(-2, -2, width + 2, 70, (24, 22, 60))
    for i in range(width // 5):
        x, y = rng.uniform(0, width), rng.uniform(0, 64)
        pen.ellipse(x, y, 0.9 + 0.5 * (i % 2), 0.9 + 0.5 * (i % 2), (250, 248, 220), outlined=False)
    x = rng.uniform(7, 14) if rng.random() < 0.5 else width - rng.uniform(7, 14)
    pen.ellipse(x, 13, 8, 8, (214, 120, 90))
    pen.ellipse(x, 13, 12, 2.4, (240, 200, 150))


def _library(pen: Pen, width: int, rng: np.random.Generator) -> None:
    pen.rectangle(-2, -2, width + 2, 70, (120, 78, 46))
    books = ((170, 56, 50), (52, 92, 140), (70, 122, 78), (214, 172, 80), (112, 74, 128))
    for row in range(3):
        x, i = -rng.uniform(0, 4), int(rng.integers(5))
        while x < width:
            tall = 14 + 3 * (i % 2)
            pen.rectangle(x, 21 * row + 20 - tall, x + 5.4, 21 * row + 20, books[i % 5])
            x, i = x + 5.4, i + 1 + (i % 3 == 0)
        pen.rectangle(-2, 21 * row + 19, width + 2, 21 * row + 22.5, (88, 54, 30))


def draw_poster(pen: Pen, logo: Logo, side: int, width: int) -> None:
    """A mark on the wall, in an upper corner."""
    x = 10 if side < 0 else width - 10
    pen.rectangle(x - 8.5, 2, x + 8.5, 19, WHITE, 1)
    draw_logo(pen, logo, x, 10.5, 8)


def draw_obstacle(pen: Pen, obstacle: str, logo: Logo | None, width: int, rng: np.random.Generator) -> None:
    """A thing that hides a part of the subject."""
    side = -1 if rng.random() < 0.5 else 1
    x = width / 2 + side * rng.uniform(3, 8)
    match obstacle:
        case "mug":
            for r in (6.5, 6.0, 5.5, 5.0):
                box = (*pen.at(x + side * 9 - r, 53 - r), *pen.at(x + side * 9 + r, 53 + r))
                pen.draw.ellipse(box, outline=(200, 200, 205), width=round(4 * pen.stroke))
            pen.rectangle(x - 9, 44, x + 9, 66, (246, 246, 248), 2)
            if logo is not None:
                draw_logo(pen, logo, x, 54, 7.5)
        case "book":
            pen.rectangle(x - 17, 48, x + 17, 70, (176, 60, 52), 1)
            pen.polygon([(x - 15, 46), (x, 49), (x, 70), (x - 15, 68)], (250, 246, 232))
            pen.polygon([(x + 15, 46), (x, 49), (x, 70), (x + 15, 68)], (250, 246, 232))
            for y in (53, 57.5, 62):
                pen.line([(x - 12, y - 1), (x - 3, y)], (150, 150, 150), 1)
                pen.line([(x + 12, y - 1), (x + 3, y)], (150, 150, 150), 1)
        case "plant":
            edge = 0 if side < 0 else width
            for dx, dy, tip in ((4, 30, 8), (12, 38, 14), (20, 47, 20)):
                leaf = [(0, 68), (dx + 5, dy + 12), (tip, dy), (dx - 5, dy + 10)]
                pen.polygon([(edge - side * px, py) for px, py in leaf], (44, 128, 62))
            pen.polygon([(edge, 50), (edge - side * 18, 64), (edge - side * 10, 70), (edge, 70)], (70, 160, 84))


def finish(image: Image.Image, light: str, style: str) -> Image.Image:
    """Reduce the large drawing, light it, and give it its style."""
    picture = image.reduce(SUPERSAMPLING)
    if light != "daylight":
        lit = np.asarray(picture, dtype=np.float32) * np.array(TINTS[light], dtype=np.float32)
        picture = Image.fromarray(lit.clip(0, 255).astype(np.uint8))
    match style:
        case "pastel":
            picture = Image.blend(picture, Image.new("RGB", picture.size, (255, 250, 244)), 0.5)
        case "pixel art":
            small = picture.reduce(2)
            picture = small.resize(picture.size, Image.Resampling.NEAREST)
        case "sepia":
            picture = ImageOps.colorize(ImageOps.grayscale(picture), (38, 22, 10), (252, 236, 204), (164, 120, 76))
        case "neon":
            edges = ImageOps.grayscale(picture).filter(ImageFilter.FIND_EDGES).point(lambda v: min(v * 3, 255))
            glow = Image.composite(picture, Image.new("RGB", picture.size, (18, 8, 44)), edges)
            picture = Image.blend(glow, ImageOps.invert(picture), 0.2)
        case "duotone":
            picture = ImageOps.colorize(ImageOps.grayscale(picture), (66, 12, 96), (255, 224, 120), (226, 70, 104))
    return picture
