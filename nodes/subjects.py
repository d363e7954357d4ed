"""A subject of Subject-Diffusion as a user gives it: its picture, its word, and where it shall be."""

from collections.abc import Sequence
from dataclasses import dataclass

from comfy_api.latest import io
from torch import Tensor

from ..models.errors import PersonalizeError
from ..models.pictures import box_of, make_picture, read_picture
from ..models.subject_diffusion import check_box
from .folders import find_picture, state_of
from .pictures import check_batch
from .schema import SHARE, Node, SubjectsType, schema

_SHARE = {
    **SHARE,
    "tooltip": "Of the box where it shall be, as a share of the picture's sides: 0.5 is the middle.",
}


@dataclass(frozen=True)
class OneSubject:
    """What *Subject* adds to a list."""

    image: Tensor
    """[H, W, 3]."""
    mask: Tensor | None
    word: str
    box: tuple[float, float, float, float]


class Subject(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeSubject",
            display_name="Subject",
            description="One subject of a picture to be made: what it looks like, which word of the prompt it is, "
            "and where it shall be.",
            search_aliases=["subject diffusion", "box", "bounding box", "region"],
            inputs=[
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The subject; of several pictures the first is taken. Or write its file.",
                ),
                io.String.Input("word", default="", tooltip="Its word in the prompt, for example dog."),
                io.Float.Input("left", default=0.25, **_SHARE),
                io.Float.Input("top", default=0.25, **_SHARE),
                io.Float.Input("width", default=0.5, **_SHARE),
                io.Float.Input("height", default=0.75, **_SHARE),
                io.String.Input(
                    "file",
                    default="",
                    placeholder="a picture's file",
                    tooltip="The subject's picture, instead of a connected one: in ComfyUI's input folder, or a full path. "
                    "Its alpha channel is its mask, unless one is connected.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the subject is in its own picture, white is the subject; without one all of the "
                    "picture is taken as it is.",
                ),
                io.Mask.Input(
                    "place",
                    optional=True,
                    tooltip="Where it shall be, painted: the box around what is white, instead of the numbers.",
                ),
                SubjectsType.Input(
                    "subjects",
                    optional=True,
                    tooltip="Others, to which this one is added: for two subjects, the first Subject's.",
                ),
            ],
            outputs=[
                SubjectsType.Output(
                    display_name="subjects", tooltip="To Apply Subject-Diffusion, or to another Subject."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file="", **_) -> str:
        return state_of(file)

    @classmethod
    def execute(
        cls,
        word,
        left,
        top,
        width,
        height,
        image=None,
        file="",
        mask=None,
        place=None,
        subjects: Sequence[OneSubject] = (),
    ) -> io.NodeOutput:
        if not word.strip():
            raise PersonalizeError("The subject has no word: write its word in the prompt, for example dog.")
        if (image is None) != bool(file.strip()):
            what = "no picture: connect one, or write" if image is None else "two pictures: a connected one and"
            raise PersonalizeError(f'The subject "{word}" has {what} its file.')
        if image is None:
            picture = read_picture(find_picture(file))
            mask = picture.mask if mask is None else mask
        else:
            check_batch(image, f'The picture of "{word}"')
            picture = make_picture(image[0, ..., :3].cpu(), None, f'The picture of "{word}"')
        box = (left, top, left + width, top + height) if place is None else painted(first_mask(place, word))
        check_box(word, box)
        own, size = None if mask is None else first_mask(mask, word), picture.pixels.shape[:2]
        if own is not None and own.shape != size:
            raise PersonalizeError(
                f'The mask of "{word}" is {own.shape[1]} x {own.shape[0]}, its picture {size[1]} x {size[0]}: they must be '
                "of one size."
            )
        if own is not None and not bool((own > 0.5).any()):
            raise PersonalizeError(f'The mask of "{word}" is empty: paint where the subject is, or leave it out.')
        one = OneSubject(picture.pixels, None if own is None else own.cpu(), word.strip(), box)
        return io.NodeOutput([*subjects, one])


def first_mask(mask: Tensor, word: str) -> Tensor:
    """[H, W] of a MASK [n, H, W] or [H, W]. Raises PersonalizeError where it is of no picture."""
    if mask.ndim not in (2, 3) or not mask.numel():
        raise PersonalizeError(f'A mask of "{word}" has the shape {tuple(mask.shape)}: check the node it comes from.')
    return mask.reshape(-1, *mask.shape[-2:])[0]


def painted(place: Tensor) -> tuple[float, float, float, float]:
    """The box around what is white of a mask [H, W], as shares."""
    try:
        left, top, right, bottom = box_of(place > 0.5)
    except ValueError:
        raise PersonalizeError("The place is an empty mask: paint where the subject shall be.") from None
    height, width = place.shape
    return left / width, top / height, right / width, bottom / height
