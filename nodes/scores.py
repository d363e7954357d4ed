"""Numbers of pictures: CLIP-I, CLIP-T and likeness, as `python -m training.evaluate` measures them."""

from collections.abc import Sequence

import torch
from comfy_api.latest import io
from torch import Tensor

from ..models import measures
from ..models.errors import PersonalizeError, plural
from ..models.pictures import Picture, frame_picture, list_pictures, make_picture, read_picture
from .encoder import encode, input_size
from .folders import find_pictures, state_of
from .pictures import check_batch, connected, folder_of_pictures, growing_pictures
from .schema import Node, schema

JUDGE, ENCODER, NONE = "pocket judge", "likeness_encoder", "none"


class ScoreImages(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeScoreImages",
            display_name="Score Images",
            description="Measures a batch of pictures, as python -m training.evaluate does: how like the references "
            "they are (CLIP-I, likeness), and how well they follow the prompt (CLIP-T).",
            search_aliases=["clip score", "clip-i", "clip-t", "dino", "similarity", "evaluate"],
            is_output_node=True,
            inputs=[
                io.Image.Input("pictures", tooltip="A batch of generated pictures."),
                io.ClipVision.Input(
                    "clip_vision",
                    tooltip="The image encoder. Compare only what one and the same encoder has measured; the field's "
                    "tables use OpenAI's ViT-B/32.",
                ),
                growing_pictures("references", "image", "Photographs of the subject, for CLIP-I and likeness"),
                folder_of_pictures("instead of or besides connected ones"),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="For CLIP-T: the text encoder of the same CLIP as clip_vision, of the base and not a trained "
                    "one. SDXL's belong to ViT-bigG, SD2's to ViT-H, the pocket model's to its own; SD1.5's has "
                    "no projection of texts, and is refused.",
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="For CLIP-T: what the pictures should show, without the trained word; a line for all, or one "
                    "for each picture.",
                ),
                io.Combo.Input(
                    "likeness",
                    options=[NONE, JUDGE, ENCODER],
                    default=NONE,
                    tooltip="Who or what it is, rather than how it looks: by the judge of the pocket model, which knows "
                    "its portraits only, or by likeness_encoder.",
                ),
                io.ClipVision.Input(
                    "likeness_encoder",
                    optional=True,
                    tooltip="Any image encoder: DINOv2 tells two dogs apart where CLIP sees dogs.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="CLIP-I",
                    tooltip="Mean cosine of the image encoder's embeddings of the pictures and of the references "
                    "(Ruiz et al. 2023): how like the photographs they look, background and pose included.",
                ),
                io.Float.Output(
                    display_name="CLIP-T",
                    tooltip="Mean cosine of the embeddings of each picture and of its prompt: how well the prompt is "
                    "followed.",
                ),
                io.Float.Output(
                    display_name="likeness",
                    tooltip="Mean cosine to the references by features that tell who or what it is.",
                ),
                io.String.Output(
                    display_name="summary", tooltip="The numbers as a line, for detail0 of Contact Sheet."
                ),
                io.String.Output(display_name="table", tooltip="The numbers of each picture, in Markdown."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder="", **_) -> str:
        return state_of(folder)

    @classmethod
    def execute(
        cls,
        pictures,
        clip_vision,
        references=None,
        folder="",
        clip=None,
        prompt="",
        likeness=NONE,
        likeness_encoder=None,
    ) -> io.NodeOutput:
        check_batch(pictures, "pictures")
        drawn = [make_picture(pixels, None, f"pictures[{i}]") for i, pixels in enumerate(pictures.cpu())]
        real = list(connected(references or {}))
        real += map(read_picture, list_pictures(find_pictures(folder)) if folder.strip() else [])
        prompts = [line.strip() for line in prompt.splitlines() if line.strip()]
        _check(len(drawn), bool(real), prompts, clip is not None, likeness, likeness_encoder)
        seen = _embeddings(clip_vision, drawn)
        columns: dict[str, Tensor] = {}
        if real:
            columns["CLIP-I"] = _to_all(seen, _embeddings(clip_vision, real))
        if prompts:
            texts = _texts(clip, prompts, seen.shape[1])
            columns["CLIP-T"] = measures.paired_cosines(
                seen, texts.expand(len(drawn), -1) if len(texts) == 1 else texts
            )
        if likeness != NONE:
            known = [_who(likeness, likeness_encoder, some) for some in (drawn, real)]
            columns["likeness"] = _to_all(*known)
        means = {name: float(column.mean()) for name, column in columns.items()}
        summary = " | ".join(f"{name} {value:.3f}" for name, value in means.items())
        numbers = [means.get(name, float("nan")) for name in ("CLIP-I", "CLIP-T", "likeness")]
        return io.NodeOutput(*numbers, summary, _table(columns), ui={"text": (summary.replace(" | ", "\n"),)})


def _check(count: int, real: bool, prompts: Sequence[str], clip: bool, likeness: str, likeness_encoder) -> None:
    """Raises PersonalizeError where something is missing for what was asked for."""
    if not real and not prompts and not clip:
        raise PersonalizeError(
            "There is nothing to compare with: connect references, or write a prompt and connect clip."
        )
    if prompts and not clip:
        raise PersonalizeError(
            "The prompt is measured with the text encoder that belongs to clip_vision: connect clip."
        )
    if clip and not prompts:
        raise PersonalizeError("There is no prompt for clip: write what the pictures should show, or disconnect it.")
    if len(prompts) not in (0, 1, count):
        raise PersonalizeError(
            f"There are {len(prompts)} prompts but {plural(count, 'picture')}: write one, or a line for each."
        )
    if likeness != NONE and not real:
        raise PersonalizeError("Likeness is measured to references: connect some, or write a folder of them.")
    if (likeness == ENCODER) != (likeness_encoder is not None):
        raise PersonalizeError(
            f"likeness is {likeness}, but likeness_encoder is {'not connected' if likeness == ENCODER else 'connected'}: "
            "change one of them."
        )


def _embeddings(clip_vision, pictures: Sequence[Picture]) -> Tensor:
    """[n, D]: the shorter side to the encoder's, and the middle, as CLIP and DINO are evaluated."""
    size = input_size(clip_vision)
    return encode(clip_vision, [frame_picture(picture, "crop", size, clip_vision.image_mean) for picture in pictures])[
        0
    ]


def _to_all(drawn: Tensor, real: Tensor) -> Tensor:
    """[n] mean cosine of each picture's features to all references'."""
    return measures.likeness(drawn, real, torch.zeros(len(drawn)), torch.zeros(len(real)))


@torch.no_grad()
def _texts(clip, prompts: Sequence[str], width: int) -> Tensor:
    """[n, D] of texts in the space of the picture's embeddings.

    Raises:
        PersonalizeError: this text encoder has no projection into it.
    """
    pooled = torch.cat([clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)[1] for text in prompts])
    # SD1.5's pooled output is not projected, and what a file lacks the host leaves as it is.
    fitting = [module for module in clip.cond_stage_model.modules() if _projects(module, width)]
    if pooled.shape[1] != width or not fitting:
        raise PersonalizeError(
            f"clip cannot be compared with clip_vision, whose pictures become {width} numbers: this text encoder has no "
            "projection to as many. Use SDXL's with CLIP-ViT-bigG, SD2's with CLIP-ViT-H, or the pocket model's with its own."
        )
    return pooled.float().cpu()


def _projects(module, width: int) -> bool:
    weight = getattr(getattr(getattr(module, "transformer", None), "text_projection", None), "weight", None)
    return weight is not None and module.return_projected_pooled and len(weight) == width and bool(weight.any())


def _who(by: str, encoder, pictures: Sequence[Picture]) -> Tensor:
    """[n, D]: features that tell who or what a picture shows."""
    if by == ENCODER:
        return _embeddings(encoder, pictures)
    from ..training.features import JudgeEye

    with torch.no_grad():
        return JudgeEye().pictures([picture.pixels for picture in pictures])["who"]


def _table(columns: dict[str, Tensor]) -> str:
    """A line for each picture, and the mean."""
    count = len(next(iter(columns.values())))
    lines = [f"| picture | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for i in range(count):
        lines.append(f"| {i + 1} | {' | '.join(f'{column[i]:.3f}' for column in columns.values())} |")
    lines.append(f"| mean | {' | '.join(f'{column.mean():.3f}' for column in columns.values())} |")
    return "\n".join(lines) + "\n"
