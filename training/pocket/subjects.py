"""Drawing one subject: body, head, hair, face, hat. One unit is half the height of an adult's head.

`turn` is -1, 0 or 1: facing the viewer's left, front or right. A turned head shows one eye and one ear.
"""

import math

from PIL import Image, ImageDraw

from .attributes import COLOURS, EYES, FURS, HAIRS, METALS, PEOPLE, PETS, SKINS, Logo, Subject
from .logos import draw_logo
from .pen import INK, SUPERSAMPLING, WHITE, Colour, Pen, shade

MOUTH: Colour = (122, 24, 34)
SHOULDERS = {"woman": 1.3, "man": 1.75, "child": 1.05, "cat": 1.05, "dog": 1.25, "robot": 1.45}


def draw_subject(pen: Pen, subject: Subject, logo: Logo | None = None) -> None:
    """The whole subject, from back to front."""
    turn = {"left": -1, "front": 0, "right": 1}[subject.pose]
    kind = subject.identity.kind
    if kind in PEOPLE:
        _back_hair(pen, subject, turn)
    _body(pen, subject)
    if logo is not None:
        draw_logo(pen, logo, 0, 2.35, 0.62)
    {"cat": _cat, "dog": _dog, "robot": _robot}.get(kind, _person)(pen, subject, turn)
    _neckwear(pen, subject)


def skin_of(subject: Subject) -> Colour:
    """The colour of skin, fur or metal."""
    who = subject.identity
    return SKINS[who.skin] if who.skin else FURS[who.fur] if who.fur else METALS[who.metal or "silver"]


# Body


def _body(pen: Pen, subject: Subject) -> None:
    who = subject.identity
    wide, base = SHOULDERS[who.kind], COLOURS[who.clothes]
    neck = 0.42 if who.kind == "man" else 0.32
    if who.kind in PEOPLE or who.kind == "robot":
        pen.rectangle(-neck, 0.6, neck, 1.5, shade(skin_of(subject), 0.86))
    top, square = (1.3, 1.0) if who.kind == "robot" else (1.18, 0.78)
    outline = [(-0.4, top - 0.1), (-wide * square, top + 0.12), (-wide, top + 0.6), (-wide - 0.15, 6)]
    shape = outline + [(-x, y) for x, y in reversed(outline)]
    pen.polygon(shape, base)
    if who.pattern != "plain":
        _pattern(pen, who.pattern, shape, WHITE if who.clothes not in ("white", "yellow") else INK)
        if pen.ink:
            pen.line([*shape, shape[0]], pen.ink, 1.5 / pen.scale)


def _pattern(pen: Pen, pattern: str, shape: list[tuple[float, float]], colour: Colour) -> None:
    stencil = Image.new("L", pen.image.size)
    draw = ImageDraw.Draw(stencil)
    unit = pen.scale * SUPERSAMPLING

    def box(x: float, y: float, w: float, h: float) -> tuple[float, float, float, float]:
        left, top = pen.at(x, y)
        return left, top, left + w * unit, top + h * unit

    columns = [i * 0.52 for i in range(-4, 5)]
    rows = [1.2 + i * 0.52 for i in range(8)]
    for j, y in enumerate(rows):
        if pattern == "striped":
            draw.rectangle(box(-3, y, 6, 0.24), fill=255)
            continue
        for i, x in enumerate(columns):
            if (i + j) % 2 == 0:
                if pattern == "dotted":
                    draw.ellipse(box(x - 0.19, y, 0.38, 0.38), fill=255)
                else:
                    draw.rectangle(box(x - 0.26, y, 0.52, 0.52), fill=255)
    clip = Image.new("L", pen.image.size)
    ImageDraw.Draw(clip).polygon([pen.at(*point) for point in shape], fill=255)
    pen.image.paste(colour, mask=Image.composite(stencil, clip, clip))


def _neckwear(pen: Pen, subject: Subject) -> None:
    who = subject.identity
    if who.neckwear_colour is None:
        return
    colour = COLOURS[who.neckwear_colour]
    if who.neckwear == "scarf":
        pen.rectangle(0.2, 1.2, 0.62, 2.3, shade(colour, 0.88), 0.08)
        pen.rectangle(-0.85, 0.98, 0.85, 1.48, colour, 0.24)
    else:
        for side in (-1, 1):
            pen.polygon([(0, 1.32), (side * 0.68, 1.0), (side * 0.68, 1.66)], colour)
        pen.ellipse(0, 1.33, 0.17, 0.19, shade(colour, 0.8))


# People


def _back_hair(pen: Pen, subject: Subject, turn: int) -> None:
    who = subject.identity
    if who.hair_colour is None or subject.hat_worn:
        return
    colour = shade(HAIRS[who.hair_colour], 0.85)
    back = -0.3 * turn
    if who.hair_style == "long":
        pen.rectangle(back - 1.12, -0.75, back + 1.12, 1.95, colour, 0.6)
    elif who.hair_style == "bob":
        pen.rectangle(back - 1.12, -0.85, back + 1.12, 0.72, colour, 0.55)
    elif who.hair_style == "curly":
        for i in range(11):
            angle = math.radians(150 + i * 24)
            pen.ellipse(back + 1.05 * math.cos(angle), -0.2 + 1.0 * math.sin(angle), 0.45, 0.45, colour)
    elif who.hair_style == "bun":
        pen.ellipse(-0.75 * turn, -1.3 + 0.15 * abs(turn), 0.5, 0.46, colour)
    elif who.hair_style == "pigtails":
        for side in (-1, 1) if turn == 0 else (-turn,):
            pen.ellipse(side * 1.3, 0.15, 0.36, 0.62, colour)
            pen.ellipse(side * 1.08, -0.38, 0.16, 0.16, (220, 50, 60))


def _person(pen: Pen, subject: Subject, turn: int) -> None:
    who = subject.identity
    skin = skin_of(subject)
    wide, tall = {"man": (0.9, 1.0), "woman": (0.84, 1.0), "child": (1.0, 0.95)}[who.kind]
    if turn == 0:
        for side in (-1, 1):
            pen.ellipse(side * wide, 0.08, 0.18, 0.24, shade(skin, 0.92))
    else:
        pen.polygon([(turn * wide * 0.8, -0.1), (turn * (wide + 0.3), 0.3), (turn * wide * 0.8, 0.4)], skin)
    if who.kind == "man":
        pen.rectangle(-wide, -tall, wide, tall, skin, 0.74)
    else:
        pen.ellipse(0, 0, wide, tall, skin)
    if who.beard == "beard":
        colour = HAIRS[who.hair_colour or "grey"]
        pen.chord(0.1 * turn, 0.06, wide, 1.06, (15, 165), colour)
    _front_hair(pen, subject, turn, wide)
    if turn != 0:
        pen.ellipse(-0.16 * turn, 0.1, 0.17, 0.24, shade(skin, 0.9))
    if who.earrings in ("gold", "blue"):
        colour = (250, 200, 40) if who.earrings == "gold" else (30, 90, 230)
        for x in (-0.95, 0.95) if turn == 0 else (-0.16 * turn,):
            pen.ellipse(x, 0.5, 0.17, 0.22, colour)
    if who.kind != "man":
        for x in (-0.55, 0.55) if turn == 0 else (0.3 * turn,):
            pen.ellipse(x, 0.36, 0.17, 0.12, _blush(skin), outlined=False)
    if turn == 0:
        pen.ellipse(0, 0.22, 0.1, 0.13, shade(skin, 0.78), outlined=False)
    _eyes(pen, subject, turn, 0.38, -0.06)
    if who.beard == "moustache":
        colour, x = HAIRS[who.hair_colour or "grey"], 0.5 * turn
        pen.polygon([(x - 0.5, 0.56), (x - 0.2, 0.3), (x + 0.2, 0.3), (x + 0.5, 0.56), (x, 0.48)], colour)
    _mouth(pen, subject, 0.46 * turn, 0.6, (206, 52, 76) if who.kind == "woman" else MOUTH)
    if subject.hat_worn:
        _hat(pen, subject, turn, wide, -0.5)


def _blush(skin: Colour) -> Colour:
    return int(skin[0] * 0.75 + 60), int(skin[1] * 0.75 + 22), int(skin[2] * 0.75 + 28)


def _front_hair(pen: Pen, subject: Subject, turn: int, wide: float) -> None:
    who = subject.identity
    if who.hair_colour is None:
        return
    colour = HAIRS[who.hair_colour]
    if subject.hat_worn:  # whatever the style, tufts at the sides
        for side in (-1, 1) if turn == 0 else (-turn,):
            pen.ellipse(side * (wide - 0.02), -0.25, 0.22, 0.42, colour)
        return
    if turn != 0:
        back = [(0.1, -0.95), (-0.6, -0.95), (-1.02, -0.4), (-1.0, 0.3), (-0.7, 0.62), (-0.36, 0.3), (-0.3, -0.3)]
        pen.polygon([(turn * x, y) for x, y in back], colour)
    if who.hair_style == "spiky":
        spikes = [(-1.0, -0.3)]
        for i in range(5):
            spikes += [(-1.05 + i * 0.42, -1.35 - 0.25 * (i % 4 > 0)), (-0.75 + i * 0.42, -0.95)]
        pen.polygon([*spikes[:-1], (1.0, -0.3), (0.5, -0.55), (-0.5, -0.55)], colour)
    else:
        pen.chord(0, -0.08, wide + 0.08, 1.08, (198, 342), colour)
    if who.hair_style in ("long", "bob"):
        low = 1.5 if who.hair_style == "long" else 0.6
        for side in (-1, 1) if turn == 0 else (-turn,):
            pen.rectangle(side * 0.93 - 0.19, -0.55, side * 0.93 + 0.19, low, colour, 0.18)
    elif who.hair_style == "curly":
        for i in range(5):
            pen.ellipse(-0.74 + i * 0.37, -0.78 + 0.14 * abs(i - 2), 0.3, 0.28, colour)


# Pets and robots


def _whiskers(pen: Pen, x: float, fur: Colour, sides: tuple[int, ...]) -> None:
    colour = INK if sum(fur) > 300 else (225, 225, 225)
    for side in sides:
        for dy in (-0.12, 0.1):
            pen.line([(x + side * 0.36, 0.42 + dy * 0.5), (x + side * 0.95, 0.4 + dy * 2)], colour, 0.055)


def _markings(pen: Pen, subject: Subject, wide: float, tall: float, y: float) -> None:
    """On the forehead of a head of half axes `wide` and `tall` at height y; a hat hides them."""
    who = subject.identity
    if subject.hat_worn:
        return
    fur = skin_of(subject)
    mark = shade(fur, 0.5) if sum(fur) > 220 else (160, 154, 158)
    if who.marking == "striped":
        for x in (-0.36, 0.0, 0.36):
            top = y - tall * (1 - (x / wide) ** 2) ** 0.5
            pen.polygon([(x - 0.13, top + 0.02), (x + 0.13, top + 0.02), (x, -0.42)], mark, outlined=False)
    elif who.marking == "two-tone":
        pen.chord(0, y, wide, tall, (212, 328), mark)


def _cat(pen: Pen, subject: Subject, turn: int) -> None:
    fur = skin_of(subject)
    for side in (-1, 1):
        x = side * 0.62 - 0.12 * turn
        pen.polygon([(x - 0.4, -0.5), (x + side * 0.26, -1.55), (x + 0.4, -0.45)], fur)
        pen.polygon([(x - 0.2, -0.6), (x + side * 0.2, -1.22), (x + 0.2, -0.58)], (236, 150, 160), outlined=False)
    pen.ellipse(0, 0, 1.06, 0.92, fur)
    _markings(pen, subject, 1.06, 0.92, 0)
    x = 0.55 * turn
    for dx in (-0.2, 0.2):
        pen.ellipse(x + dx, 0.44, 0.26, 0.22, shade(fur, 1.55), outlined=False)
    _whiskers(pen, x, fur, (-1, 1) if turn == 0 else (turn, -turn))
    _eyes(pen, subject, turn, 0.44, -0.05)
    _mouth(pen, subject, x, 0.62, MOUTH, 0.75)
    pen.polygon([(x - 0.16, 0.22), (x + 0.16, 0.22), (x, 0.42)], (226, 100, 120))
    if subject.hat_worn:
        _hat(pen, subject, turn, 0.8, -0.5)


def _dog(pen: Pen, subject: Subject, turn: int) -> None:
    fur = skin_of(subject)
    ear = shade(fur, 0.62) if sum(fur) > 220 else (96, 92, 100)
    if turn == 0:
        for side in (-1, 1):
            pen.ellipse(side * 1.05, 0.1, 0.34, 0.85, ear)
    pen.ellipse(0, -0.05, 0.96, 0.95, fur)
    _markings(pen, subject, 0.96, 0.95, -0.05)
    x = 0.62 * turn
    pen.ellipse(x, 0.45, 0.56, 0.46, shade(fur, 1.5))
    if turn != 0:
        pen.ellipse(-0.62 * turn, 0.12, 0.34, 0.8, ear)
    _eyes(pen, subject, turn, 0.4, -0.14)
    _mouth(pen, subject, x, 0.62, MOUTH, 0.85)
    pen.ellipse(x + 0.18 * turn, 0.24, 0.24, 0.17, INK)
    if subject.hat_worn:
        _hat(pen, subject, turn, 0.82, -0.52)


def _robot(pen: Pen, subject: Subject, turn: int) -> None:
    who = subject.identity
    metal = skin_of(subject)
    dark = shade(metal, 0.6)
    if not subject.hat_worn:
        for x in {"none": (), "one": (0.0,), "two": (-0.5, 0.5)}[who.antenna or "none"]:
            pen.line([(x, -0.8), (x * 1.3, -1.4)], dark, 0.12)
            pen.ellipse(x * 1.3, -1.48, 0.2, 0.2, (240, 70, 60))
    for side in (-1, 1) if turn == 0 else ():
        pen.rectangle(side * 1.0 - 0.16, -0.25, side * 1.0 + 0.16, 0.3, dark, 0.06)
    pen.rectangle(-0.95, -0.9, 0.95, 0.92, metal, 0.2)
    pen.rectangle(-0.8 + 0.3 * turn, -0.5, 0.8 + 0.3 * turn, 0.24, shade(metal, 1.6), 0.2)
    if turn != 0:
        pen.ellipse(-0.55 * turn, 0.05, 0.26, 0.26, dark)
    _eyes(pen, subject, turn, 0.38, -0.12)
    _mouth(pen, subject, 0.4 * turn, 0.58, (60, 40, 60))
    if subject.hat_worn:
        _hat(pen, subject, turn, 0.85, -0.62)


# Face


def _eyes(pen: Pen, subject: Subject, turn: int, apart: float, y: float) -> None:
    who = subject.identity
    places = (-apart, apart) if turn == 0 else (apart * 1.15 * turn,)
    big = 1.18 if who.kind in ("child", *PETS) else 1.0
    iris, lid = EYES[who.eyes], shade(skin_of(subject), 0.45)
    dark_face = sum(skin_of(subject)) < 250
    brow = (225, 222, 220) if dark_face else INK
    if who.hair_colour is not None:
        brow = shade(HAIRS[who.hair_colour], 0.75)
    for x in places:
        inner = 1 if x < 0 else -1
        if turn != 0:
            inner = turn
        if subject.expression == "sleeping":
            pen.arc(x, y - 0.05, 0.24, 0.2, (10, 170), lid if not dark_face else (235, 228, 222), 0.1)
        else:
            tall = 0.34 if subject.expression == "surprised" else 0.27
            pen.ellipse(x, y, 0.25 * big, tall * big, WHITE)
            pen.ellipse(x + 0.06 * turn, y + 0.02, 0.175 * big, 0.19 * big, iris, outlined=False)
            pen.ellipse(x + 0.06 * turn, y + 0.02, 0.075 * big, 0.09 * big, INK, outlined=False)
            if who.kind == "woman":
                pen.arc(x, y, 0.27, tall + 0.03, (190, 350), INK, 0.09)
        tilt = {"angry": 0.14, "sad": -0.14}.get(subject.expression, 0.0)
        lift = 0.5 if subject.expression == "surprised" else 0.4
        width = 0.13 if who.kind == "man" else 0.09
        pen.line([(x - 0.2, y - lift - tilt * inner), (x + 0.2, y - lift + tilt * inner)], brow, width)
    _glasses(pen, who.glasses, places, y, turn, light_frame=dark_face)


def _glasses(pen: Pen, glasses: str, places: tuple[float, ...], y: float, turn: int, light_frame: bool) -> None:
    if glasses == "none":
        return
    frame = (250, 205, 60) if light_frame else INK
    near, far = (places[0], places[-1])
    pen.line([(near, y - 0.06), (far, y - 0.06)], frame, 0.1)
    if turn != 0:
        pen.line([(near, y - 0.08), (-0.2 * turn, y - 0.08)], frame, 0.1)
    for x in places:
        if glasses == "sunglasses":
            if light_frame:
                pen.rectangle(x - 0.44, y - 0.38, x + 0.44, y + 0.38, frame, 0.16)
            pen.rectangle(x - 0.37, y - 0.31, x + 0.37, y + 0.31, INK, 0.12)
            pen.line([(x - 0.2, y + 0.08), (x + 0.02, y - 0.16)], (150, 160, 175), 0.08)
            continue
        for step in range(4):  # a bold ring, drawn as neighbouring outlines
            r = 0.42 - step * 0.03
            box = (*pen.at(x - r, y - r * 0.95), *pen.at(x + r, y + r * 0.95))
            if glasses == "round":
                pen.draw.ellipse(box, outline=frame, width=round(3 * pen.stroke))
            else:
                pen.draw.rectangle(box, outline=frame, width=round(3 * pen.stroke))


def _mouth(pen: Pen, subject: Subject, x: float, y: float, colour: Colour, size: float = 1.0) -> None:
    dark_face = sum(skin_of(subject)) < 250
    line = (60, 16, 20) if not dark_face else (245, 190, 180)
    w = 0.36 * size
    match subject.expression:
        case "smiling":
            pen.chord(x, y - 0.12, w, 0.36 * size, (0, 180), colour)
            pen.rectangle(x - w * 0.72, y - 0.12, x + w * 0.72, y + 0.0, WHITE, 0.02)
        case "sad":
            pen.arc(x, y + 0.26, w * 0.9, 0.3 * size, (190, 350), line, 0.13)
        case "surprised":
            pen.ellipse(x, y + 0.04, 0.21 * size, 0.27 * size, colour)
        case "angry":
            pen.rectangle(x - w, y - 0.1, x + w, y + 0.2, INK, 0.1)
            for dx in (-0.22, 0.0, 0.22):
                pen.rectangle(x + dx * size - 0.09, y - 0.04, x + dx * size + 0.09, y + 0.14, WHITE)
        case _:
            pen.line([(x - 0.16 * size, y + 0.06), (x + 0.16 * size, y + 0.06)], line, 0.12)


def _hat(pen: Pen, subject: Subject, turn: int, wide: float, y: float) -> None:
    """A hat whose rim is at height y of a head that is `wide` there."""
    who = subject.identity
    colour = COLOURS[who.hat_colour]
    band = shade(colour, 0.6) if who.hat_colour != "black" else (150, 150, 158)
    w = wide + 0.14
    if who.hat == "cap":
        pen.chord(0, y, w, 0.82, (180, 360), colour)
        if turn == 0:
            pen.ellipse(0, y, w * 0.85, 0.17, band)
        else:
            pen.rectangle(min(0.35 * turn, 1.55 * turn), y - 0.14, max(0.35 * turn, 1.55 * turn), y + 0.1, band, 0.1)
    elif who.hat == "beanie":
        pen.ellipse(0, y - 0.95, 0.26, 0.26, WHITE)
        pen.chord(0, y, w, 0.85, (180, 360), colour)
        pen.rectangle(-w, y - 0.26, w, y + 0.1, shade(colour, 1.4), 0.1)
    elif who.hat == "top hat":
        pen.rectangle(-w * 0.72, y - 1.1, w * 0.72, y, colour, 0.05)
        pen.rectangle(-w * 0.72, y - 0.3, w * 0.72, y - 0.06, band)
        pen.rectangle(-w * 1.2, y - 0.1, w * 1.2, y + 0.12, colour, 0.08)
    else:
        pen.polygon([(-w * 0.8, y), (0.2 * w, y - 1.55), (w * 0.8, y)], colour)
        pen.rectangle(-w * 0.74, y - 0.3, w * 0.74, y - 0.08, band)
        pen.ellipse(0, y, w * 1.35, 0.2, colour)
