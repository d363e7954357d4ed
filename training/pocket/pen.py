"""A pen that draws in a subject's own units, four times as large as the picture, so that reducing it smooths edges."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

SUPERSAMPLING = 4
Colour = tuple[int, int, int]
INK: Colour = (30, 26, 32)
WHITE: Colour = (250, 250, 250)
Points = Sequence[tuple[float, float]]


def shade(colour: Colour, factor: float) -> Colour:
    """Darker (factor < 1) or lighter (factor > 1)."""
    if factor <= 1:
        return tuple(int(c * factor) for c in colour)  # type: ignore[return-value]
    return tuple(int(c + (255 - c) * (factor - 1)) for c in colour)  # type: ignore[return-value]


class Pen:
    """Draws on `image`, and the same silhouettes in white on `mask` where one is given.

    x to the right and y down, in units of `scale` pixels from `centre` (pixels of the finished picture).
    Shapes get an outline in a darker shade; `ink`, where set, replaces its colour and doubles its width. `stroke`
    widens outlines in pictures larger than 64 px.
    """

    def __init__(
        self,
        image: Image.Image,
        centre: tuple[float, float] = (0, 0),
        scale: float = 1,
        ink: Colour | None = None,
        mask: Image.Image | None = None,
        stroke: float = 1,
    ):
        self.image, self.mask = image, mask
        self.draw = ImageDraw.Draw(image)
        self.mask_draw = None if mask is None else ImageDraw.Draw(mask)
        self.centre, self.scale, self.ink, self.stroke = centre, scale, ink, stroke

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Canvas coordinates of a point."""
        return (
            (self.centre[0] + self.scale * x) * SUPERSAMPLING,
            (self.centre[1] + self.scale * y) * SUPERSAMPLING,
        )

    def _outline(self, fill: Colour, outlined: bool) -> dict:
        if not outlined:
            return {"fill": fill}
        if self.ink is not None:
            return {"fill": fill, "outline": self.ink, "width": round(6 * self.stroke)}
        return {"fill": fill, "outline": shade(fill, 0.72), "width": round(3 * self.stroke)}

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Colour, outlined: bool = True) -> None:
        box = (*self.at(x - rx, y - ry), *self.at(x + rx, y + ry))
        self.draw.ellipse(box, **self._outline(fill, outlined))
        if self.mask_draw:
            self.mask_draw.ellipse(box, fill=255)

    def chord(self, x: float, y: float, rx: float, ry: float, angles: tuple[float, float], fill: Colour) -> None:
        """The part of an ellipse cut off by the line between two angles (degrees, clockwise from 3 o'clock)."""
        box = (*self.at(x - rx, y - ry), *self.at(x + rx, y + ry))
        self.draw.chord(box, *angles, **self._outline(fill, True))
        if self.mask_draw:
            self.mask_draw.chord(box, *angles, fill=255)

    def arc(self, x: float, y: float, rx: float, ry: float, angles: tuple[float, float], fill: Colour, width: float):
        box = (*self.at(x - rx, y - ry), *self.at(x + rx, y + ry))
        self.draw.arc(box, *angles, fill=fill, width=self._thick(width))

    def polygon(self, points: Points, fill: Colour, outlined: bool = True) -> None:
        corners = [self.at(*point) for point in points]
        self.draw.polygon(corners, **self._outline(fill, outlined))
        if self.mask_draw:
            self.mask_draw.polygon(corners, fill=255)

    def rectangle(self, left: float, top: float, right: float, bottom: float, fill: Colour, radius: float = 0):
        box = (*self.at(left, top), *self.at(right, bottom))
        corner = radius * self.scale * SUPERSAMPLING
        self.draw.rounded_rectangle(box, corner, **self._outline(fill, True))
        if self.mask_draw:
            self.mask_draw.rounded_rectangle(box, corner, fill=255)

    def line(self, points: Points, fill: Colour, width: float) -> None:
        self.draw.line([self.at(*point) for point in points], fill=fill, width=self._thick(width), joint="curve")

    def _thick(self, width: float) -> int:
        return max(round(width * self.scale * SUPERSAMPLING), 1)
