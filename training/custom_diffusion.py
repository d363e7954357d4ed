"""Learn one concept or several (Custom Diffusion): keys and values of the cross-attention, and a word for each concept.

    python -m training.custom_diffusion --pretrained_model_name_or_path MODEL --output_dir FOLDER \\
        --concept photographs/rex:ohwx:dog --concept photographs/mug:zxcv:mug

Kumari et al. 2023: pictures of all concepts train W_k and W_v of every cross-attention layer together, with pictures of
their classes (--with_prior_preservation) so that the classes stay what they were. Concepts that were trained apart are
merged by `python -m training.merge_concepts`.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers.training_utils import cast_training_params

from .about import KINDS
from .base_model import BaseModel
from .concepts import Concept, check_start, concepts_of, starts_of
from .conditioning import Conditioning
from .methods import PRECISIONS, group_of, shapes_of, text_modules
from .options import CustomDiffusion
from .settings import Settings
from .shared import (
    ALL,
    CALL,
    KEYS_AND_VALUES,
    RARE,
    About,
    PersonalizeError,
    call_of,
    concept_changes,
    concept_tensors,
    hold_first,
    host_layers,
    is_trained,
    read_safetensors,
    read_word,
    title_of,
    word_tensors,
    write_safetensors,
)
from .textual_inversion import add_words


class CustomDiffusionMethod:
    """Some matrices of the cross-attention, and a learned word for each concept in each text encoder."""

    name = "custom_diffusion"
    conditioning: Conditioning | None = None
    trains_text, writes_all = True, False

    def __init__(self, base: BaseModel, settings: Settings):
        self.base, self.settings = base, settings
        self.concepts = concepts_of(settings)
        options: CustomDiffusion = settings.method
        unet, parts = base.pipeline.unet, ALL if options.train_layers == "all" else KEYS_AND_VALUES
        self.shapes = shapes_of(unet)
        unet.requires_grad_(False)
        for name, module in unet.named_modules():
            if is_trained(name, parts):
                module.requires_grad_(True)
            if is_trained(name, KEYS_AND_VALUES):
                module.register_forward_hook(lambda _, __, states: hold_first(states))
        cast_training_params(unet, dtype=torch.float32)
        self.before = {name: p.detach().cpu().clone() for name, p in unet.named_parameters() if p.requires_grad}
        self.tokens = [f"<concept-{i}>" for i in range(len(self.concepts))]
        if problems := check_start(options, self.concepts):
            raise PersonalizeError("\n".join(problems))
        starts = starts_of(options)[: len(self.tokens)]
        self.words = add_words(
            base, self.tokens, lambda tokenizer, table: table.weight.detach()[_ids(tokenizer, starts)]
        )
        names = [f"{name}.vectors" for name, _ in text_modules(base)]
        vectors = [word.vectors for word in self.words]
        learned = {"params": vectors, "lr": settings.text_rate, "names": names, "weight_decay": 0.0, "words": True}
        if options.max_word_norm:
            learned["max_norms"] = [options.max_word_norm * word.usual_norm for word in self.words]
        self.groups = [group_of([("unet", unet)], settings.rate), learned]

    def spoken(self, text: str) -> str:
        """Each trigger becomes its concept's token."""
        tokens = dict(zip((concept.trigger for concept in self.concepts), self.tokens, strict=True))
        triggers = re.compile("|".join(call_of(trigger).pattern for trigger in tokens))
        return triggers.sub(lambda found: tokens[found[0]], text)

    def write(self, folder: Path, name: str, about: About) -> list[Path]:
        """NAME.safetensors for models/loras, and for each concept NAME_TRIGGER.safetensors for models/embeddings."""
        options: CustomDiffusion = self.settings.method
        dtype = PRECISIONS[self.settings.output.save_precision]
        state = self.base.pipeline.unet.state_dict()
        changes = {key: state[key].detach().cpu().float() - value for key, value in self.before.items()}
        tensors = {key: value.to(dtype) for key, value in concept_tensors(changes, options.compression).items()}
        path, words = folder / f"{name}.safetensors", word_names(name, self.concepts)
        called = [f"{CALL}{word} {concept.class_name}" for word, concept in zip(words, self.concepts, strict=True)]
        classes = ", ".join(concept.class_name for concept in self.concepts)
        whole = _named(about, "custom_diffusion", ", ".join(called), classes)
        write_safetensors(path, tensors, whole.as_metadata())
        concept_changes(read_safetensors(path)[0], host_layers(self.shapes, []), path.name)
        paths, widths = [path], [word.table.embedding_dim for word in self.words]
        for i, (word, concept) in enumerate(zip(words, self.concepts, strict=True)):
            paths.append(folder / f"{word}.safetensors")
            vectors = [learned.vectors[i : i + 1].detach().cpu().to(dtype) for learned in self.words]
            own = _named(about, "textual_inversion", f"{CALL}{word}", concept.class_name)
            write_safetensors(paths[-1], word_tensors(vectors), own.as_metadata())
            read_word(read_safetensors(paths[-1])[0], widths, paths[-1].name, title_of(self.base.family))
        return paths


def _named(about: About, method: str, trigger: str, class_name: str) -> About:
    """What one of the files says of itself."""
    architecture = about.extra["modelspec.architecture"].partition("/")[0] + KINDS[method]
    extra = {"modelspec.trigger_phrase": trigger, "modelspec.architecture": architecture}
    return replace(about, method=method, trigger=trigger, class_name=class_name, extra={**about.extra, **extra})


def word_names(name: str, concepts: Sequence[Concept]) -> list[str]:
    """Of the files of the concepts' words, without ending: what calls them in ComfyUI's prompts."""
    return [f"{name}_{concept.trigger}" for concept in concepts]


def _ids(tokenizer, words: Sequence[str]) -> list[int]:
    """Of a single token each: that of a rare word is the vocabulary's entry, which is no whole word of a text."""
    return [
        tokenizer.convert_tokens_to_ids(word)
        if word in RARE
        else tokenizer(word, add_special_tokens=False).input_ids[0]
        for word in words
    ]


if __name__ == "__main__":
    from .run import main

    sys.exit(main("custom_diffusion", __doc__))
