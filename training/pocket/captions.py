"""Captions of scenes, in varied words, and what each of them says, so that prompt following can be counted.

What varies (pose, expression, background, light, framing) is mostly said; what belongs to the identity is said or left
out at random. Only what the picture shows is said. A few captions say "character" for the kind, for prompts that leave
it to a reference.
"""

from dataclasses import dataclass

import numpy as np

from .attributes import BACKGROUND_COLOURS, PEOPLE, PETS, Scene

EXPRESSION_WORDS = {
    "smiling": ("smiling", "happy"),
    "sad": ("sad", "unhappy"),
    "surprised": ("surprised", "astonished"),
    "angry": ("angry", "furious"),
    "sleeping": ("sleeping",),
}
POSE_WORDS = {
    "left": ("facing left", "looking to the left", "in profile to the left"),
    "front": ("facing forward", "seen from the front", "looking at the viewer"),
    "right": ("facing right", "looking to the right", "in profile to the right"),
}
PLACE_WORDS = {
    "beach": ("on a beach", "at the beach"),
    "forest": ("in a forest", "among trees"),
    "city": ("in a city", "in the city"),
    "mountains": ("in the mountains", "in front of mountains"),
    "space": ("in space", "among the stars"),
    "library": ("in a library", "in front of bookshelves"),
}
LIGHT_WORDS = {
    "daylight": ("in daylight",),
    "warm": ("in warm light", "in warm evening light"),
    "cool": ("in cool light", "in cold blue light"),
}
NOUNS = {"woman": "lady", "man": "guy", "child": "kid", "cat": "kitten", "dog": "puppy", "robot": "android"}
OBSTACLE_WORDS = {
    "mug": ("with a mug", "behind a white mug"),
    "book": ("holding a book", "reading a book"),
    "plant": ("behind a plant", "behind green leaves"),
}
OPENINGS = {
    "portrait": ("", "", "", "a portrait of ", "a picture of ", "a drawing of ", "a photo of "),
    "close-up": ("a close-up of ", "a close-up portrait of "),
    "half-length": ("a half-length portrait of ", "a half-length picture of "),
}
STYLE_WORDS = {"comic": "in comic style", "pastel": "in pastel colours", "pixel art": "in pixel art style"}


@dataclass(frozen=True)
class Caption:
    """A text, and the attributes that it names: of each subject, and of the scene."""

    text: str
    subjects: tuple[dict[str, str], ...]
    scene: dict[str, str]


class _Speaker:
    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def one_of(self, words: tuple[str, ...]) -> str:
        return words[int(self.rng.integers(len(words)))]


class _Thorough(_Speaker):
    """Says all that may be said."""

    def chance(self, probability: float) -> bool:
        return probability > 0


def learning_caption(scene: Scene, rng: np.random.Generator, style: str | None) -> str:
    """A caption to personalise by, with {trigger} and {class} for what is to be learned; only what varies is said.

    That is the mark where the scene has one, the style where that is given, else the subject.
    """
    speak = _Speaker(rng)
    owned: list[dict[str, str]] = []
    noun = "{trigger} {class}" if scene.logo is None and style is None else None
    phrases = [_subject(speak, shown, 1.0, 0.0, owned, noun) for shown in scene.subject_values()]
    mark = None if scene.logo is None else "a {trigger} {class}"
    _, rest = _around(speak, scene, 1.0, mark)
    if style is not None:
        rest = [words for words in rest if words not in STYLE_WORDS.values()] + ["in the style of {trigger}"]
    return ", ".join([*phrases, *rest])


def caption(scene: Scene, rng: np.random.Generator) -> Caption:
    """One of many captions of the scene."""
    speak = _Speaker(rng)
    mood = rng.random()  # 0.12: the kind alone; 0.23: what varies; else any
    varying = 0.0 if mood < 0.12 else 0.75
    owned = 0.0 if mood < 0.35 else float(rng.choice((0.2, 0.4, 0.7))) * (0.6 if len(scene.subjects) > 1 else 1.0)
    said: list[dict[str, str]] = []
    phrases = [_subject(speak, shown, varying, owned, said) for shown in scene.subject_values()]
    joint = speak.one_of((" and ", " and ", " next to ", " beside "))
    text = ("," * any("," in phrase for phrase in phrases) + joint).join(phrases)
    named, rest = _around(speak, scene, varying)
    opening = ""
    if scene.framing == "portrait" or "framing" in named:
        opening = speak.one_of(OPENINGS[scene.framing])
    return Caption(opening + ", ".join([text, *rest]), tuple(said), named)


def identity_words(shown: dict[str, str], rng: np.random.Generator) -> str:
    """A phrase that says what of `shown` belongs to the identity, "a cat with green eyes in a red shirt", and nothing that varies."""
    return _subject(_Thorough(rng), shown, 0.0, 1.0, [], shown["kind"])


def _around(speak: _Speaker, scene: Scene, varying: float, mark: str | None = None) -> tuple[dict[str, str], list[str]]:
    named, rest = {}, []
    if speak.chance(varying * 1.2):
        named["background"] = scene.background
        colour = speak.one_of(("on a {} background", "against a {} background", "in front of a {} wall"))
        if scene.background in BACKGROUND_COLOURS:
            rest.append(colour.format(scene.background))
        else:
            rest.append(speak.one_of(PLACE_WORDS[scene.background]))
    if speak.chance(varying if scene.light != "daylight" else 0.2 * varying):
        named["light"] = scene.light
        rest.append(speak.one_of(LIGHT_WORDS[scene.light]))
    if scene.obstacle != "none" and (speak.chance(varying) or scene.logo is not None):
        named["obstacle"] = scene.obstacle
        if scene.logo is None:
            rest.insert(0, speak.one_of(OBSTACLE_WORDS[scene.obstacle]))
    if scene.logo is not None:
        mark = mark or article(f"{scene.logo.colour} {scene.logo.shape} logo")
        rest.insert(
            0, f"{mark} on the wall" if scene.logo.place == "wall" else f"with {mark} on the {scene.logo.place}"
        )
    if scene.framing != "portrait" and speak.chance(varying):
        named["framing"] = scene.framing
    if scene.style in STYLE_WORDS:
        named["style"] = scene.style
        rest.append(STYLE_WORDS[scene.style])
    return named, rest


def article(words: str) -> str:
    """A cat, an android."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def _subject(
    speak: _Speaker,
    shown: dict[str, str],
    varying: float,
    owned: float,
    said: list[dict[str, str]],
    called: str | None = None,
) -> str:
    """One subject in words, `called` so if given; appends to `said` what of `shown` they name."""
    anonymous = speak.chance(0.08)
    named = {} if anonymous else {"kind": shown["kind"]}
    said.append(named)

    def name(*attributes: str) -> bool:
        """Say these together, if all are to be seen; remember that they were said."""
        if all(a in shown for a in attributes) and speak.chance(owned):
            named.update({a: shown[a] for a in attributes})
            return True
        return False

    before: list[str] = []
    own: list[str] = []
    wears: list[str] = []
    after: list[str] = []
    if speak.chance(varying):
        named["expression"] = shown["expression"]
        word = speak.one_of(EXPRESSION_WORDS[shown["expression"]])
        (before if speak.chance(0.6) else after).append(word)
    if speak.chance(varying):
        named["pose"] = shown["pose"]
        after.append(speak.one_of(POSE_WORDS[shown["pose"]]))
    if shown["kind"] in PEOPLE:
        _person_words(shown, name, own)
    elif shown["kind"] in PETS:
        if name("marking") and shown["marking"] != "plain":
            before.append(shown["marking"])
        if name("fur"):
            before.append(shown["fur"])
    else:
        if name("metal"):
            before.append(shown["metal"])
        if name("antenna"):
            own.append({"none": "no antenna", "one": "one antenna", "two": "two antennas"}[shown["antenna"]])
    if name("eyes"):
        own.append(f"{shown['eyes']} eyes")
    if shown["glasses"] != "none" and name("glasses"):
        own.append(shown["glasses"] if shown["glasses"] == "sunglasses" else f"{shown['glasses']} glasses")
    if shown["hat_worn"] == "yes" and speak.chance(max(owned, varying)):
        named["hat_worn"] = "yes"
        if called is None and speak.chance(0.8):
            named.update(hat=shown["hat"], hat_colour=shown["hat_colour"])
            wears.append(article(f"{shown['hat_colour']} {shown['hat']}"))
        else:
            wears.append("a hat")
    if "neckwear_colour" in shown and name("neckwear", "neckwear_colour"):
        wears.append(article(f"{shown['neckwear_colour']} {shown['neckwear']}"))
    if name("clothes"):
        pattern = f"{shown['pattern']} " if shown.get("pattern", "plain") != "plain" and speak.chance(0.7) else ""
        if pattern:
            named["pattern"] = shown["pattern"]
        wears.append(article(f"{shown['clothes']} {pattern}{speak.one_of(('shirt', 'sweater', 'top'))}"))
    noun = "character" if anonymous else NOUNS[shown["kind"]] if speak.chance(0.15) else shown["kind"]
    return _compose(speak, called or noun, before, own, wears, after)


def _person_words(shown: dict[str, str], name, own: list[str]) -> None:
    if name("skin"):
        own.append(f"{shown['skin']} skin")
    style, colour = shown.get("hair_style"), shown.get("hair_colour")
    if style == "bald":
        if name("hair_style"):
            own.append("a bald head")
    elif style and name("hair_colour", "hair_style"):
        words = {"bun": f"{colour} hair in a bun", "bob": f"a {colour} bob", "pigtails": f"{colour} pigtails"}
        own.append(words.get(style, f"{style} {colour} hair"))
    elif colour and name("hair_colour"):
        own.append(f"{colour} hair")
    if shown.get("beard", "none") != "none" and name("beard"):
        own.append(f"a {shown['beard']}")
    if shown.get("earrings", "none") != "none" and name("earrings"):
        own.append(f"{shown['earrings']} earrings")


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _compose(speak: _Speaker, noun: str, before: list[str], own: list[str], wears: list[str], after: list[str]) -> str:
    phrase = article(" ".join([*before, noun]))
    own, wears = [list(speak.rng.permutation(words)) for words in (own, wears)]
    if own:
        phrase += f" with {_listed(own)}"
    if wears:
        phrase += speak.one_of((" wearing ", " in ")) + _listed(wears)
    return ", ".join([phrase, *after])
