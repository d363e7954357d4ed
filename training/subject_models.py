"""The models that make a data set for Subject-Diffusion: BLIP-2, a spaCy tagger, Grounding DINO and SAM, each by itself.

Each is loaded when it is made, on the GPU where there is one; BLIP-2 in half precision there, as it is the largest. From
a folder the network is never touched.
"""

import gc
import importlib.util
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

from .features import check_model
from .pocket.device import DEVICE
from .shared import PersonalizeError
from .subject_data import Detection

TAGGING = {"tagger", "morphologizer", "attribute_ruler"}
"""Parts of a spaCy pipeline, any of which says what is a noun."""
NO_NOUN = "no noun"
"""The label of a box whose words are no noun of the caption: two words, so that the rules drop it."""
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
PROCESSORS = ("processor_config.json", "preprocessor_config.json")


class Captioner:
    """BLIP-2 (Li et al. 2023, arXiv:2301.12597): what is in a picture, without a question."""

    def __init__(self, where: str, max_new_tokens: int):
        """Args:
        where: folder or hub id.
        max_new_tokens: of a caption, at most.

        Raises:
            PersonalizeError: it cannot be loaded.
        """
        from transformers import Blip2ForConditionalGeneration, Blip2Processor

        self.dtype = torch.float16 if DEVICE == "cuda" else torch.float32
        kinds = Blip2ForConditionalGeneration, Blip2Processor
        self.model, self.processor = _load(*kinds, where, "--captioner", self.dtype)
        self.max_new_tokens = max_new_tokens

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> list[str]:
        """A caption of each, all at once; greedy, in one line."""
        inputs = self.processor(images=list(pictures), return_tensors="pt").to(DEVICE, self.dtype)
        ids = self.model.generate(pixel_values=inputs.pixel_values, max_new_tokens=self.max_new_tokens, do_sample=False)
        texts = self.processor.batch_decode(ids, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


class Tagger:
    """A spaCy pipeline: the nouns of a caption."""

    def __init__(self, where: str):
        """Args:
        where: an installed pipeline's name, or a folder.

        Raises:
            PersonalizeError: it cannot be loaded.
        """
        import spacy

        try:
            self.pipeline = spacy.load(where if spacy.util.is_package(where) else Path(where).expanduser())
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise PersonalizeError(f"--tagger {where} cannot be loaded: {_reason(error)}") from None

    def __call__(self, texts: Sequence[str]) -> list[list[str]]:
        """The common nouns of each text, as they stand there, every time."""
        return [[token.text for token in doc if token.pos_ == "NOUN"] for doc in self.pipeline.pipe(texts)]


class Detector:
    """Grounding DINO (Liu et al. 2023, arXiv:2303.05499): boxes of words."""

    def __init__(self, where: str, box_threshold: float, text_threshold: float):
        """Args:
        where: folder or hub id.
        box_threshold: score of a box, above.
        text_threshold: score of a token of the box's label, above.

        Raises:
            PersonalizeError: it cannot be loaded.
        """
        from transformers import AutoProcessor, GroundingDinoForObjectDetection

        kinds = GroundingDinoForObjectDetection, AutoProcessor
        self.model, self.processor = _load(*kinds, where, "--detector", torch.float32)
        self.thresholds = {"threshold": box_threshold, "text_threshold": text_threshold}

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], nouns: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """What is found of each picture's nouns, in pixels within the picture; all pictures at once, padded to one size."""
        texts = [". ".join(dict.fromkeys(map(_plain, words))) + "." for words in nouns]
        inputs = self.processor(images=list(pictures), text=texts, padding=True, return_tensors="pt").to(DEVICE)
        sizes = [(picture.height, picture.width) for picture in pictures]
        answers = self.processor.post_process_grounded_object_detection(
            self.model(**inputs), inputs.input_ids, target_sizes=sizes, **self.thresholds
        )
        special = re.compile("|".join(map(re.escape, self.processor.tokenizer.all_special_tokens)))
        found = []
        for answer, words, (height, width) in zip(answers, nouns, sizes, strict=True):
            bounds = torch.tensor([width, height, width, height])
            boxes = answer["boxes"].float().cpu().clamp(min=0).minimum(bounds).tolist()
            labels = [noun_of(special.sub(" ", label), words) for label in answer["text_labels"]]
            scores = answer["scores"].tolist()
            found.append([Detection(*one) for one in zip(labels, map(tuple, boxes), scores, strict=True)])
        return found


class Segmenter:
    """SAM (Kirillov et al. 2023, arXiv:2304.02643): masks of boxes."""

    def __init__(self, where: str, mask_threshold: float):
        """Args:
        where: folder or hub id.
        mask_threshold: logit of a pixel of the mask, above.

        Raises:
            PersonalizeError: it cannot be loaded.
        """
        from transformers import SamModel, SamProcessor

        self.model, self.processor = _load(SamModel, SamProcessor, where, "--segmenter", torch.float32)
        self.mask_threshold = mask_threshold

    @torch.no_grad()
    def __call__(
        self, pictures: Sequence[Image.Image], boxes: Sequence[Sequence[tuple[float, ...]]]
    ) -> list[np.ndarray]:
        """The mask of each box, [boxes, H, W] of bool for each picture; all pictures at once.

        Args:
            pictures: RGB.
            boxes: of each picture at least one, in pixels.
        """
        most = max(map(len, boxes))  # those with fewer are filled up, as the processor takes no others
        filled = [[list(box) for box in (*own, *[own[-1]] * (most - len(own)))] for own in boxes]
        inputs = self.processor(images=list(pictures), input_boxes=filled, return_tensors="pt")
        logits = self.model(
            pixel_values=inputs["pixel_values"].to(DEVICE),
            input_boxes=inputs["input_boxes"].to(DEVICE, torch.float32),
            multimask_output=False,
        ).pred_masks
        masks = self.processor.image_processor.post_process_masks(
            logits.cpu(), inputs["original_sizes"], inputs["reshaped_input_sizes"], self.mask_threshold
        )
        return [mask[: len(own), 0].numpy() for mask, own in zip(masks, boxes, strict=True)]


def noun_of(label: str, nouns: Sequence[str]) -> str:
    """The noun that a label of Grounding DINO names, as it stands in the caption.

    A label is whatever tokens scored high: with full stops between the nouns, in small letters, without accents, and
    sometimes only a piece of a noun.

    Args:
        label: of a box, without special tokens.
        nouns: of the caption.

    Returns:
        The noun; where there are several, all words; where there is none, or the piece is in several, NO_NOUN.
    """
    words = list(dict.fromkeys(word for word in re.split(r"[\s.]+", label.replace("##", "")) if word))
    if len(words) > 1:
        return " ".join(words)
    forms = {_plain(noun): noun for noun in reversed(nouns)}
    among = [form for form in forms if words and words[0] in form]
    if words and words[0] in forms:
        among = words
    return forms[among[0]] if len(among) == 1 else NO_NOUN


def _plain(word: str) -> str:
    """A word as an uncased tokenizer has it."""
    letters = unicodedata.normalize("NFD", word.lower())
    return "".join(letter for letter in letters if unicodedata.category(letter) != "Mn")


def check_processor(where: str, option: str, model_type: str, tokenizer: bool) -> None:
    """Look at a model's folder, with what prepares its inputs; of a hub id only that it can be one.

    Args:
        where: folder or hub id.
        option: for the message.
        model_type: that it must be of.
        tokenizer: whether it reads texts.

    Raises:
        PersonalizeError: there is no such folder, it is another model's, or something of it is missing.
    """
    check_model(where, option, (model_type,))
    folder = Path(where).expanduser()
    for names in (PROCESSORS, TOKENIZERS) if tokenizer else (PROCESSORS,):
        if folder.is_dir() and not any((folder / name).is_file() for name in names):
            raise PersonalizeError(
                f"{option} {where} has no {' or '.join(names)}: download all of the model's files, not the weights alone."
            )


def check_tagger(where: str) -> None:
    """Look at a spaCy pipeline without loading it.

    Raises:
        PersonalizeError: spaCy or the pipeline is missing, or it does not tag.
    """
    if importlib.util.find_spec("spacy") is None:
        raise PersonalizeError(
            "Finding the nouns of captions needs the package spacy: pip install spacy, then python -m spacy download "
            "en_core_web_sm."
        )
    import spacy

    installed = spacy.util.is_package(where)
    folder = Path(spacy.util.get_package_path(where)) if installed else Path(where).expanduser()
    if not folder.is_dir():
        raise PersonalizeError(
            f"--tagger {where} is no installed spaCy pipeline, and no folder: python -m spacy download {where}, or name "
            "a folder."
        )
    try:
        parts = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["pipeline"]
    except (OSError, ValueError, KeyError, TypeError):
        raise PersonalizeError(
            f"--tagger {where} is no folder of a spaCy pipeline: meta.json is missing or damaged."
        ) from None
    if not TAGGING & set(parts):
        raise PersonalizeError(
            f"--tagger {where} does not tag parts of speech (it has {', '.join(parts) or 'no parts'}): use one that does, "
            "such as en_core_web_sm."
        )


def release_memory() -> None:
    """Of models that nothing uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _load(model: Any, processor: Any, where: str, option: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model of transformers on DEVICE, and its processor."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    local = Path(where).expanduser().is_dir()
    source = str(Path(where).expanduser()) if local else where
    try:
        prepares = processor.from_pretrained(source, local_files_only=local)
        found = model.from_pretrained(source, local_files_only=local, torch_dtype=dtype)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise PersonalizeError(f"{option} {where} cannot be loaded: {_reason(error)}") from None
    return found.eval().to(DEVICE), prepares


def _reason(error: Exception) -> str:
    """The first line of what it says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
