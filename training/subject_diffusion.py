"""Train Subject-Diffusion (Ma et al. 2023, arXiv:2307.11410): subjects from a picture and a box, for any subject at once.

    python -m training.subject_diffusion --pretrained_model_name_or_path MODEL --image_encoder ENCODER \\
        --instance_data_dir SUBJECTS --output_dir FOLDER

SUBJECTS is a data set of captions, words, boxes, masks and crops (training/subject_data.py says how it looks; `python -m
training.pocket subjects` draws one). What trains: the adapters between self- and cross-attention, the first convolution, W_k and W_v of
the cross-attention, the text encoder, and what makes tokens of the image encoder's features.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from diffusers.training_utils import cast_training_params
from transformers import CLIPVisionModelWithProjection

from .base_model import BaseModel
from .clip_tokenizer import LENGTH, clip_tokenizer
from .conditioning import Conditioning
from .dataset import Example, Sizes, upright_size
from .encoding import Cache
from .identities import Held
from .image_encoder import load_image_encoder
from .methods import PRECISIONS, group_of
from .options import SubjectDiffusion as Options
from .settings import Settings
from .shared import (
    KEYS_AND_VALUES,
    PLACEHOLDER,
    WORDS,
    About,
    ChangedRows,
    PersonalizeError,
    fused_prompt,
    is_trained,
    read_safetensors,
    read_subject_diffusion,
    write_safetensors,
)
from .subject_conditioning import Dropout, SubjectConditioning
from .subject_data import SubjectPicture, read_subjects
from .subject_features import SubjectFeatures
from .subject_network import Placeholders, SubjectNetwork, load_subject_file


class SubjectDiffusionMethod:
    """The added parts, attached to a UNet and its text encoder."""

    name = "subject_diffusion"
    trains_text = True
    writes_all = False

    def __init__(self, base: BaseModel, settings: Settings):
        self.base, self.settings = base, settings
        options: Options = settings.method
        unet, (text,) = base.pipeline.unet, base.text_encoders
        self.token = placeholder_of(base)
        encoder = load_image_encoder(options.image_encoder or "").to(unet.device)
        self.encoder: CLIPVisionModelWithProjection | None = encoder
        config = encoder.config
        torch.manual_seed(settings.training.seed)
        tokens = (config.image_size // config.patch_size) ** 2
        self.network = SubjectNetwork(unet, config.projection_dim, config.hidden_size, tokens).to(unet.device)
        unet.requires_grad_(False)
        for name, module in unet.named_modules():
            if is_trained(name, KEYS_AND_VALUES):
                module.requires_grad_(True)
        text.requires_grad_(True)
        table = text.get_input_embeddings()
        self.words = table.weight.detach().cpu().clone()
        cast_training_params([unet, text], dtype=torch.float32)
        if options.subject_diffusion is not None:
            load_subject_file(Path(options.subject_diffusion).expanduser(), self.network, base)
        kv = group_of([("unet", unet)], settings.rate)
        self.network.attach(unet)
        words = group_of([("words", table)], settings.rate)
        table.requires_grad_(False)
        others = group_of([("text_encoder", text), ("network", self.network)], settings.rate)
        table.requires_grad_(True)
        self.groups = [
            kv,
            others,
            {**words, "weight_decay": 0.0, "words": True},
        ]  # words that never come up stay as they are
        self.placeholders = Placeholders(text, self.token)
        self.features: SubjectFeatures | None = None
        self.conditioning: Conditioning | None = None

    def see(self, pictures: Iterable[SubjectPicture], cache: Cache) -> None:
        """Encode subjects with the image encoder, or take their features from the cache."""
        options: Options = self.settings.method
        pictures = list(pictures)
        if self.features is None:
            self.features = SubjectFeatures(cache, self.encoder, options.augmentations, options.backgrounds)
        self.features.add(self.encoder, pictures, pictures)

    def begin(self, pictures: Mapping[Path, SubjectPicture], sizes: Mapping[Path, tuple[int, int]]) -> None:
        """All is seen: the image encoder is let go. Pictures are brought to `sizes`, height and width."""
        options: Options = self.settings.method
        assert self.features is not None
        self.encoder = None
        tokenizer, captions = self.base.pipeline.tokenizer, {}
        for one in pictures.values():
            caption = spoken_of(one, options.max_subjects)
            ids = tokenizer(caption, truncation=True).input_ids
            captions[caption] = [i for i, token in enumerate(ids) if token == self.token]
        self.conditioning = SubjectConditioning(
            self.network,
            self.base.pipeline.unet,
            self.placeholders,
            self.features,
            pictures,
            options.max_subjects,
            Dropout(options.text_dropout, options.subject_dropout, options.both_dropout),
            (options.localisation, options.localisation_weight),
            options.without,
            captions,
            sizes,
            self.base.pipeline.vae_scale_factor,
            self.settings.training.seed,
        )

    def spoken(self, text: str) -> str:
        """Captions are ordinary words; the placeholder is one of the tokenizer's."""
        return text

    def write(self, folder: Path, name: str, about: About) -> list[Path]:
        """NAME.safetensors: the added parts, W_k and W_v, and the text encoder, of whose words only those that changed."""
        path, dtype = folder / f"{name}.safetensors", PRECISIONS[self.settings.output.save_precision]
        unet, text = self.base.pipeline.unet.state_dict(), self.base.text_encoders[0].state_dict()
        tensors = {f"parts.{key}": value for key, value in self.network.state_dict().items()}
        tensors |= {
            f"unet.{key}": value for key, value in unet.items() if is_trained(key.rpartition(".")[0], KEYS_AND_VALUES)
        }
        tensors |= {f"text.{key}": value for key, value in text.items() if not key.endswith(WORDS)}
        written = {
            key: value.detach().cpu().to(dtype).contiguous()
            for key, value in tensors.items()
            if value.is_floating_point()
        }
        table = self.base.text_encoders[0].get_input_embeddings().weight.detach().cpu()
        changed = ChangedRows.of(self.words.to(dtype), table.to(dtype))
        written |= {"words.index": changed.index, "words.weight": changed.weight}
        write_safetensors(path, written, about.as_metadata())
        if read_safetensors(path)[0].keys() != written.keys():
            raise PersonalizeError(f"{path} was not written as it should be: run the same command again.")
        read_subject_diffusion(path)
        return [path]


def placeholder_of(base: BaseModel) -> int:
    """The placeholder's number.

    Raises:
        PersonalizeError: the base has two text encoders, or the placeholder is no single token.
    """
    if len(base.text_encoders) != 1:
        raise PersonalizeError(
            f"Subject-Diffusion is for base models with one text encoder, as SD1.5 and SD2; {base.name} has "
            f"{len(base.text_encoders)}."
        )
    ids = base.pipeline.tokenizer(PLACEHOLDER, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise PersonalizeError(f'"{PLACEHOLDER}" is {len(ids)} tokens of {base.name}\'s tokenizer: it must be one.')
    return ids[0]


def spoken_of(picture: SubjectPicture, most: int) -> str:
    """A picture's caption with a placeholder for each of its first subjects."""
    return fused_prompt(picture.text, [one.entity for one in picture.subjects[:most]])


def told_whole(pictures: Sequence[SubjectPicture], most: int) -> list[SubjectPicture]:
    """Those whose captions, with the subjects behind, are no longer than CLIP reads."""
    tokenizer = clip_tokenizer()
    texts = [spoken_of(one, most) for one in pictures]
    lengths = [len(ids) for ids in tokenizer(texts).input_ids] if texts else []
    return [one for one, length in zip(pictures, lengths, strict=True) if length <= LENGTH]


def find_subjects(
    settings: Settings, sizes: Sizes
) -> tuple[list[Example], list[Example], dict[Path, SubjectPicture], Held]:
    """Everything that Subject-Diffusion trains on.

    Returns:
        The pictures to predict; those that are kept out; all of them by path; and of each to draw samples of, itself.

    Raises:
        PersonalizeError: a data set is not one.
    """
    options: Options = settings.method
    folders = settings.data.instance_data_dir, settings.data.validation_data_dir
    examples: list[list[Example]] = []
    pictures: dict[Path, SubjectPicture] = {}
    for folder in folders:
        own = [] if not folder else told_whole(read_subjects(Path(folder).expanduser()), options.max_subjects)
        pictures |= {one.path: one for one in own}
        examples.append([example_of(one, options.max_subjects, sizes) for one in own])
    learned = examples[0] * settings.data.repeats
    held: Held = {one.path: (one.path,) for one in examples[1][:SHOWN]}
    return learned, examples[1], pictures, held


SHOWN = 4
"""Held-out pictures in a sheet of samples."""


def example_of(picture: SubjectPicture, most: int, sizes: Sizes) -> Example:
    """As the training sees it."""
    return Example(picture.path, (spoken_of(picture, most),), sizes.nearest(*upright_size(picture.path)))


if __name__ == "__main__":
    from .run import main

    sys.exit(main("subject_diffusion", __doc__))
