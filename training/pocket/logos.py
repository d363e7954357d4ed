"""Small coloured marks, as on a shirt, a mug or a wall."""

import math

from .attributes import COLOURS, Logo
from .pen import WHITE, Pen


def draw_logo(pen: Pen, logo: Logo, x: float, y: float, radius: float) -> None:
    """A coloured mark on a white disc."""
    colour = COLOURS[logo.colour]
    pen.ellipse(x, y, radius, radius, WHITE)
    r = radius * 0.74

    def corners(count: int, start: float, radii: tuple[float, ...]) -> list[tuple[float, float]]:
        angles = [math.radians(start + i * 360 / count) for i in range(count)]
        return [
            (x + radii[i % len(radii)] * r * math.cos(a), y + radii[i % len(radii)] * r * math.sin(a))
            for i, a in enumerate(angles)
        ]

    match logo.shape:
        case "star":
            pen.polygon(corners(10, -90, (1.1, 0.48)), colour, outlined=False)
        case "triangle":
            pen.polygon(corners(3, -90, (1.05,)), colour, outlined=False)
        case "ring":
            pen.ellipse(x, y, r * 0.95, r * 0.95, colour, outlined=False)
            pen.ellipse(x, y, r * 0.42, r * 0.42, WHITE, outlined=False)
        case "cross":
            for w, h in ((1.0, 0.34), (0.34, 1.0)):
                pen.rectangle(x - w * r, y - h * r, x + w * r, y + h * r, colour)
        case "heart":
            for side in (-1, 1):
                pen.ellipse(x + side * 0.42 * r, y - 0.3 * r, 0.5 * r, 0.5 * r, colour, outlined=False)
            pen.polygon([(x - 0.88 * r, y - 0.08 * r), (x + 0.88 * r, y - 0.08 * r), (x, y + r)], colour, False)
        case "moon":
            pen.ellipse(x, y, r, r, colour, outlined=False)
            pen.ellipse(x + 0.45 * r, y - 0.2 * r, 0.75 * r, 0.75 * r, WHITE, outlined=False)
        case _:
            bolt = [(0.3, -1), (-0.7, 0.2), (-0.05, 0.2), (-0.3, 1), (0.7, -0.25), (0.05, -0.25)]
            pen.polygon([(x + dx * r, y + dy * r) for dx, dy in bolt], colour, outlined=False)
