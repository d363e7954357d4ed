"""Who and what is on a pocket portrait: identities, and scenes that show them.

An identity is a fixed set of attributes. A scene shows one or two identities and varies what a photograph varies:
pose, expression, framing, background, light, a hat worn or not, a thing in front. What a scene hides it says
(`Scene.subject_values`), so that a judge is asked only what a person could see.
"""

from dataclasses import asdict, dataclass, field

import numpy as np

KINDS = ("woman", "man", "child", "cat", "dog", "robot")
PEOPLE, PETS = ("woman", "man", "child"), ("cat", "dog")

SKINS = {"light": (250, 218, 192), "tan": (222, 170, 122), "brown": (160, 106, 72), "dark": (92, 60, 45)}
HAIRS = {
    "black": (38, 34, 38),
    "brown": (112, 66, 36),
    "blond": (240, 206, 100),
    "red": (206, 74, 30),
    "grey": (170, 171, 178),
    "blue": (62, 112, 218),
    "pink": (238, 112, 176),
}
FURS = {
    "white": (240, 240, 238),
    "grey": (138, 142, 150),
    "black": (50, 48, 56),
    "orange": (238, 148, 60),
    "brown": (124, 80, 52),
}
METALS = {
    "silver": (188, 195, 204),
    "golden": (228, 184, 70),
    "red": (204, 62, 58),
    "blue": (74, 128, 208),
    "green": (92, 172, 104),
}
EYES = {"brown": (120, 66, 28), "blue": (50, 130, 235), "green": (60, 170, 70)}
COLOURS = {
    "red": (206, 42, 48),
    "orange": (242, 136, 32),
    "yellow": (248, 214, 64),
    "green": (52, 152, 72),
    "blue": (46, 98, 206),
    "purple": (128, 62, 168),
    "pink": (246, 152, 188),
    "white": (240, 240, 236),
    "black": (46, 46, 54),
}
HATS = ("cap", "beanie", "top hat", "pointed hat")
HAT_COLOURS = ("red", "yellow", "green", "blue", "purple", "black")
NECKWEAR = ("none", "scarf", "bow tie")
GLASSES = ("none", "round", "square", "sunglasses")
PATTERNS = ("plain", "striped", "dotted", "checked")
HAIR_STYLES = {
    "woman": ("long", "bob", "curly", "bun"),
    "man": ("short", "spiky", "curly", "bald"),
    "child": ("short", "pigtails", "curly", "bob"),
}
BEARDS = ("none", "beard", "moustache")
EARRINGS = ("none", "gold", "blue")
MARKINGS = ("plain", "striped", "two-tone")  # of the top of a pet's head
ANTENNAS = ("none", "one", "two")

POSES = ("left", "front", "right")
EXPRESSIONS = ("smiling", "sad", "surprised", "angry", "sleeping")
FRAMINGS = ("close-up", "portrait", "half-length")
BACKGROUND_COLOURS = {
    "blue": (120, 176, 240),
    "green": (142, 206, 138),
    "yellow": (248, 226, 130),
    "pink": (246, 184, 204),
    "grey": (176, 178, 184),
    "purple": (172, 142, 214),
}
PLACES = ("beach", "forest", "city", "mountains", "space", "library")
BACKGROUNDS = (*BACKGROUND_COLOURS, *PLACES)
LIGHTS = ("daylight", "warm", "cool")
OBSTACLES = ("none", "mug", "book", "plant")
STYLES = ("flat", "comic", "pastel", "pixel art")
NEW_STYLES = ("sepia", "neon", "duotone")  # never in the base model's data: for learning a style
LOGO_SHAPES = ("star", "heart", "ring", "triangle", "cross")
NEW_LOGO_SHAPES = ("moon", "bolt")  # never in the base model's data: for learning a logo
LOGO_COLOURS = ("red", "orange", "green", "blue", "purple", "black")
LOGO_PLACES = ("shirt", "mug", "wall")

# Every attribute of a subject that a judge reads, with its values.
SUBJECT_VALUES = {
    "kind": KINDS,
    "skin": tuple(SKINS),
    "hair_style": ("long", "bob", "curly", "bun", "short", "spiky", "bald", "pigtails"),
    "hair_colour": tuple(HAIRS),
    "beard": BEARDS,
    "earrings": EARRINGS,
    "fur": tuple(FURS),
    "marking": MARKINGS,
    "metal": tuple(METALS),
    "antenna": ANTENNAS,
    "eyes": tuple(EYES),
    "glasses": GLASSES,
    "neckwear": NECKWEAR,
    "neckwear_colour": HAT_COLOURS,
    "clothes": tuple(COLOURS),
    "pattern": PATTERNS,
    "hat": HATS,
    "hat_colour": HAT_COLOURS,
    "pose": POSES,
    "expression": EXPRESSIONS,
    "hat_worn": ("no", "yes"),
}
SCENE_VALUES = {"background": BACKGROUNDS, "light": LIGHTS, "framing": FRAMINGS, "obstacle": OBSTACLES, "style": STYLES}
VALUES = {**SUBJECT_VALUES, **SCENE_VALUES}
"""In the judge's order."""
ATTRIBUTES = "attributes.json"
"""The file in an identity's folder that says who it is."""


@dataclass(frozen=True)
class Identity:
    """One person, pet or robot; `None` where the kind has no such thing."""

    kind: str
    eyes: str
    glasses: str
    neckwear: str
    neckwear_colour: str | None
    clothes: str
    pattern: str
    hat: str
    hat_colour: str
    skin: str | None = None
    hair_style: str | None = None
    hair_colour: str | None = None
    beard: str | None = None
    earrings: str | None = None
    fur: str | None = None
    marking: str | None = None
    metal: str | None = None
    antenna: str | None = None


@dataclass(frozen=True)
class Logo:
    """A coloured mark, and where it is."""

    shape: str
    colour: str
    place: str


@dataclass(frozen=True)
class Subject:
    """An identity as one picture shows it."""

    identity: Identity
    pose: str
    expression: str
    hat_worn: bool

    def values(self) -> dict[str, str]:
        """Every attribute that is to be seen from head to shoulders, by name."""
        shown = {name: value for name, value in asdict(self.identity).items() if value is not None}
        shown |= {"pose": self.pose, "expression": self.expression, "hat_worn": "yes" if self.hat_worn else "no"}
        hidden = hidden_by_hat(self.hat_worn)
        if self.identity.glasses == "sunglasses" or self.expression == "sleeping":
            hidden.add("eyes")
        if self.identity.hair_style == "bald" and self.hat_worn:
            hidden.add("hair_colour")
        return {name: value for name, value in shown.items() if name not in hidden}


def hidden_by_hat(worn: bool) -> set[str]:
    """What a picture cannot show with a hat, or without."""
    return {"hair_style", "marking", "antenna"} if worn else {"hat", "hat_colour"}


@dataclass(frozen=True)
class Scene:
    """One picture: everything that its drawing depends on, apart from the small jitter of `seed`."""

    subjects: tuple[Subject, ...]
    background: str
    light: str = "daylight"
    framing: str = "portrait"
    obstacle: str = "none"
    style: str = "flat"
    logo: Logo | None = None
    seed: int = 0
    size: tuple[int, int] = field(default=(64, 64))  # width, height in pixels
    places: tuple[float, ...] | None = None
    """The middle of each subject, as a share of the width; None where the drawing puts them."""

    def subject_values(self) -> list[dict[str, str]]:
        """Every attribute of each subject that the picture really shows, by name.

        A close-up cuts the clothes off, and an open book covers what is at the neck.
        """
        hidden = set[str]()
        if self.framing == "close-up":
            hidden = {"clothes", "pattern"}
        elif self.framing == "portrait" and self.obstacle == "book":
            hidden = {"neckwear", "neckwear_colour", "pattern"}
        return [
            {name: value for name, value in subject.values().items() if name not in hidden} for subject in self.subjects
        ]

    def values(self) -> dict[str, str]:
        """What the picture shows beside its subjects, by name."""
        return {name: getattr(self, name) for name in SCENE_VALUES}


def _pick(rng: np.random.Generator, values, weights=None) -> str:
    if weights is None:
        return values[int(rng.integers(len(values)))]
    total = np.cumsum(weights)
    return values[int(np.searchsorted(total, rng.random() * total[-1], side="right"))]


def sample_identity(rng: np.random.Generator) -> Identity:
    """A random identity; millions are possible."""
    kind = _pick(rng, KINDS)
    neckwear = _pick(rng, NECKWEAR, (2, 1, 1))
    own: dict[str, str | None] = {}
    if kind in PEOPLE:
        own = {"skin": _pick(rng, tuple(SKINS)), "hair_style": _pick(rng, HAIR_STYLES[kind])}
        own["hair_colour"] = None if own["hair_style"] == "bald" else _pick(rng, tuple(HAIRS))
        if kind == "man":
            own["beard"] = _pick(rng, BEARDS)
        if kind == "woman":
            own["earrings"] = _pick(rng, EARRINGS)
    elif kind in PETS:
        own = {"fur": _pick(rng, tuple(FURS)), "marking": _pick(rng, MARKINGS)}
    else:
        own = {"metal": _pick(rng, tuple(METALS)), "antenna": _pick(rng, ANTENNAS)}
    return Identity(
        kind=kind,
        eyes=_pick(rng, tuple(EYES)),
        glasses=_pick(rng, GLASSES, (5, 2, 2, 1)),
        neckwear=neckwear,
        neckwear_colour=None if neckwear == "none" else _pick(rng, HAT_COLOURS),
        clothes=_pick(rng, tuple(COLOURS)),
        pattern=_pick(rng, PATTERNS, (2, 1, 1, 1)),
        hat=_pick(rng, HATS),
        hat_colour=_pick(rng, HAT_COLOURS),
        **own,
    )


def sample_scene(
    rng: np.random.Generator, identities: tuple[Identity, ...] | None = None, pairs: float = 0.3, **fixed
) -> Scene:
    """A random scene of `identities`, or of one or (with probability `pairs`) two fresh ones.

    `fixed` sets fields of the scene instead of drawing them. Pairs are half as wide again.
    """
    if identities is None:
        identities = tuple(sample_identity(rng) for _ in range(2 if rng.random() < pairs else 1))
    subjects = tuple(
        Subject(who, _pick(rng, POSES, (1, 1.5, 1)), _pick(rng, EXPRESSIONS), bool(rng.random() < 0.35))
        for who in identities
    )
    alone = len(subjects) == 1
    framing = _pick(rng, FRAMINGS, (1, 2, 1)) if alone else "portrait"
    obstacle = _pick(rng, OBSTACLES, (7, 1, 1, 1)) if alone and framing != "close-up" else "none"
    logo = None
    if alone and rng.random() < 0.15:
        place = _pick(rng, LOGO_PLACES)
        logo = Logo(_pick(rng, LOGO_SHAPES), _pick(rng, LOGO_COLOURS), place)
        if place == "mug":
            obstacle, framing = "mug", "portrait"
        elif place == "shirt":
            obstacle, framing = "none", "half-length"
    scene = {
        "background": _pick(rng, BACKGROUNDS),
        "light": _pick(rng, LIGHTS, (3, 1, 1)),
        "framing": framing,
        "obstacle": obstacle,
        "style": _pick(rng, STYLES, (17, 1, 1, 1)),
        "logo": logo,
        "seed": int(rng.integers(2**31)),
        "size": (64, 64) if alone else (96, 64),
    }
    return Scene(subjects, **(scene | fixed))
