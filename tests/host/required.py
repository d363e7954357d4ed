"""What the pictures of each template must show: what its prompt and its files ask for, as the judge reads it."""

import json
from dataclasses import dataclass
from functools import cache
from io import BytesIO

import numpy as np
from pack.training.demo.find import ROOT
from pack.training.pocket.measure import VALUES, read
from pack.training.pocket.shipped import load_judge
from PIL import Image

HEIGHT, GAP = 64, 8


@dataclass(frozen=True)
class Required:
    """Of the pictures that one node saves.

    `windows` has for each subject, from left to right, the attributes that at least the share `most` of the pictures must
    show, and `some` those for which `fewer` is enough: each a picture of four less than was measured; of one
    or three all. `absent` may be shown by no more than one in four. `blur` is between what was measured and what one
    step leaves; `beside` is how many pictures stand side by side in the file.
    """

    windows: tuple[dict[str, str], ...]
    some: tuple[dict[str, str], ...] = ()
    absent: tuple[dict[str, str], ...] = ()
    most: float = 0.75
    fewer: float = 0.5
    blur: float = 0.26
    beside: int = 1


LEFT = {"pose": "left", "expression": "smiling", "background": "beach"}
HERS = {"kind": "woman", "skin": "light", "hair_colour": "pink", "earrings": "gold", "clothes": "red"}
CURLY, TIE = {"hair_style": "curly"}, {"neckwear": "bow tie"}
ROBOT = {"kind": "robot", "metal": "golden", "clothes": "purple", "eyes": "blue", "neckwear": "scarf"}
ROBOT |= {"neckwear_colour": "yellow"}
CHECKED = {"hair_colour": "pink", "glasses": "sunglasses", "pattern": "checked"}
WORD = Required(({"hair_colour": "pink", "glasses": "square"} | LEFT,))
LORA = Required((HERS | CURLY | TIE | LEFT,), blur=0.29)
REQUIRED = {
    "attend_and_excite": {
        "plain": Required(({"kind": "dog"},), absent=(TIE,)),
        "attend_and_excite": Required(({"kind": "dog", "neckwear_colour": "green"} | TIE,)),
    },
    "attention_maps": {
        "picture": Required(
            (
                {"kind": "woman", "hair_colour": "red", "expression": "smiling", "background": "forest"},
                {"kind": "dog", "background": "forest"},
            ),
            blur=0.33,
        )
    },
    "compare_methods": {
        "compare_without": Required(
            ({"kind": "woman"} | LEFT,), absent=({"hair_colour": "pink", "glasses": "square"} | TIE,)
        ),
        "compare_textual_inversion": WORD,
        "compare_lora": LORA,
        "compare_dreambooth": Required((HERS | CURLY | LEFT,), ({"glasses": "square"},), blur=0.29),
    },
    "composable_diffusion": {
        "plain": Required(({"kind": "cat", "hat_colour": "blue"},), absent=({"fur": "orange"},)),
        "composed": Required(({"kind": "cat", "hat_colour": "blue", "hat_worn": "yes"},), ({"fur": "orange"},)),
    },
    "custom_diffusion": {
        "custom_diffusion": Required(
            (
                CURLY
                | {"kind": "woman", "earrings": "gold", "skin": "light", "neckwear_colour": "green"}
                | {"pose": "left", "background": "forest"},
            ),
            (TIE,),
            blur=0.3,
        )
    },
    "custom_diffusion_merged": {
        "custom_diffusion_merged": Required(
            (
                CURLY
                | {"kind": "woman", "skin": "light", "earrings": "gold", "glasses": "square", "background": "beach"},
                {"kind": "dog", "fur": "orange", "background": "beach"},
            ),
            ({"hair_colour": "pink"}, {"marking": "striped"}),
            blur=0.28,
        )
    },
    "dreambooth": {"dreambooth": Required((HERS | LEFT,), ({"glasses": "square"},), blur=0.29)},
    "ip_adapter_compare_aggregations": {
        "compare": Required(
            (
                {"glasses": "round", "neckwear": "scarf", "clothes": "yellow", "eyes": "green"}
                | {"pose": "front", "expression": "surprised", "background": "library"},
            ),
            blur=0.37,
            beside=3,
        )
    },
    "ip_adapter_one_reference": {
        "one_reference": Required((ROBOT | {"pose": "left", "expression": "sad", "background": "beach"},))
    },
    "ip_adapter_saved_references": {
        "saved_references": Required(
            (
                {"kind": "woman", "skin": "light", "hair_colour": "pink", "glasses": "square", "eyes": "brown"}
                | {"pose": "front", "expression": "smiling", "background": "beach"},
            )
        )
    },
    "ip_adapter_self_attention": {
        "self_attention": Required(
            (
                {"kind": "cat", "fur": "grey", "eyes": "blue", "clothes": "red", "pattern": "plain"}
                | {"pose": "front", "expression": "surprised", "background": "forest"},
            ),
            blur=0.3,
            beside=3,
        )
    },
    "ip_adapter_two_masks": {
        "two_masks": Required(
            (
                ROBOT | {"pattern": "dotted", "background": "mountains"},
                {
                    "kind": "dog",
                    "fur": "white",
                    "clothes": "green",
                    "expression": "surprised",
                    "background": "mountains",
                },
            ),
            blur=0.25,
        )
    },
    "lora": {"lora": LORA},
    "subject_diffusion_one": {
        "subject_diffusion_one": Required(
            ({"background": "beach"}, {"kind": "woman"} | CHECKED | LEFT), ({}, {"clothes": "black"}), blur=0.2
        )
    },
    "subject_diffusion_two": {
        "subject_diffusion_two": Required(
            (
                {"kind": "woman", "clothes": "black", "background": "forest"} | CHECKED | TIE,
                {"kind": "dog", "fur": "orange", "clothes": "pink", "neckwear_colour": "green", "background": "forest"}
                | TIE,
            ),
            blur=0.3,
        )
    },
    "text_to_image": {
        "text_to_image": Required(
            (
                {
                    "kind": "woman",
                    "hair_colour": "red",
                    "glasses": "round",
                    "neckwear": "scarf",
                    "neckwear_colour": "blue",
                }
                | CURLY
                | {"expression": "smiling", "pose": "front", "background": "forest"},
            ),
            blur=0.3,
        )
    },
    "textual_inversion": {"textual_inversion": WORD},
    "train_lora": {
        "train_lora": Required(
            (
                {"kind": "woman", "earrings": "gold", "neckwear": "scarf", "neckwear_colour": "blue"}
                | {"pose": "left", "background": "beach"},
            ),
            ({"skin": "tan", "hair_colour": "red", "clothes": "yellow"} | CURLY,),
        )
    },
}
"""By template, and by the end of the name under which the pictures are saved. `measure_methods` saves a sheet."""


class NotShownError(AssertionError):
    """Pictures do not show what they must."""


def workflow_of(name):
    """A shipped workflow as the editor saves it."""
    return json.loads((ROOT / "workflows" / f"{name}.json").read_text())


def saved_pictures(server, prompt):
    """Run a prompt; the files of each saving node, by the end of the name that it gives them."""
    outputs, found = server.run(prompt), {}
    for node, inner in prompt.items():
        if inner["class_type"] == "SaveImage":
            files = [Image.open(BytesIO(server.picture(picture))) for picture in outputs[node]["images"]]
            found[inner["inputs"]["filename_prefix"].partition("personalize/")[2]] = files
    return found


def in_pixels(files, beside=1):
    """Pictures as the model made them, [n, 64, width, 3]: without the enlargement, and each by itself."""
    pixels = []
    for file in files:
        width = round(HEIGHT * file.width / file.height)
        picture = np.asarray(file.convert("RGB").resize((width, HEIGHT)))
        side = (width - (beside - 1) * GAP) // beside
        pixels += [picture[:, i * (side + GAP) : i * (side + GAP) + side] for i in range(beside)]
    return np.stack(pixels)


def smoothness(pixels):
    """Of neighbouring pixels [n, h, w, 3], the shares that are alike, and that differ a little.

    The model's pictures are flat areas with edges: blurred ones have few alike, and many that differ a little; noise has
    hardly any alike.
    """
    steps = [np.abs(np.diff(pixels.astype(int), axis=axis)).max(-1).reshape(len(pixels), -1) for axis in (1, 2)]
    difference = np.concatenate(steps, 1)
    return (difference <= 4).mean(1), ((difference > 4) & (difference < 20)).mean(1)


@cache
def judge():
    return load_judge()


def share_that_shows(seen, attribute, value):
    return float(np.mean([VALUES[attribute][number] == value for number in seen[attribute]]))


def measured(files, required):
    """What is required of pictures, and of how many it is true: name -> (share, least, most)."""
    pixels = in_pixels(files, required.beside)
    alike, little = smoothness(pixels)
    found = {"alike": (float(alike.mean()), 0.3, 1.0), "blur": (float(little.mean()), 0.0, required.blur)}
    windows = read(judge(), pixels)
    assert len(windows) == len(required.windows)
    for group, least, most in (
        (required.windows, required.most, 1.0),
        (required.some, required.fewer, 1.0),
        (required.absent, 0.0, 0.25),
    ):
        for number, attributes in enumerate(group):
            for attribute, value in attributes.items():
                share = share_that_shows(windows[number], attribute, value)
                found[f"{number}: {attribute} {value}"] = (share, least, most)
    return found


def check(pictures, required):
    """Pictures show all that is required of them. Raises NotShownError with what they do not."""
    missed = {}
    for name, one in required.items():
        for what, (share, least, most) in measured(pictures[name], one).items():
            if not least <= share <= most:
                missed[name, what] = (share, least, most)
    if missed:
        raise NotShownError(missed)
