"""Prompts that are followed, while a diffusers pipeline draws: Composable Diffusion, and words for Attend-and-Excite."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from .base_model import BaseModel
from .encoding import TextStates, stack_texts
from .shared import WINDOW, PersonalizeError, compose, find_words, parse_words, words_in

PLAIN, ATTEND_AND_EXCITE, COMPOSABLE_DIFFUSION = "plain", "attend_and_excite", "composable_diffusion"
PROMPT_METHODS = (PLAIN, ATTEND_AND_EXCITE, COMPOSABLE_DIFFUSION)


def excited_places(base: BaseModel, prompt: str, words: str) -> list[list[int]]:
    """Which of the prompt's 77 tokens are those of each word, or "quoted phrase", every time it comes.

    Raises:
        PersonalizeError: a word is not in the prompt, or behind its 77th token.
    """
    tokenizer = base.pipeline.tokenizer
    convert = getattr(base.pipeline, "maybe_convert_prompt", lambda text, _: text)  # a learned word is several tokens

    def tokens(text: str) -> list[int]:
        return tokenizer(convert(text, tokenizer)).input_ids[1:-1]

    said = [None, *tokens(prompt)[: WINDOW - 2]]
    try:
        return find_words(said, {word: tokens(word) for word in parse_words(words)}, words_in(prompt))
    except PersonalizeError as error:
        raise PersonalizeError(f'"{prompt}": {error}') from None


@contextmanager
def composed(
    unet: UNet2DConditionModel, negative: TextStates, concepts: Sequence[TextStates], weights: Sequence[Sequence[float]]
):
    """A block in which the UNet predicts several concepts in one call, and passes on what guides like all of them.

    Its caller's guidance, eps_u + s (eps - eps_u), then is eps_u + s sum_i w_i (eps_i - eps_u): Composable Diffusion
    (Liu et al. 2022, equation 11).

    Args:
        unet: called with [negative, positive] of n pictures, or with n where the caller does not guide.
        negative: n rows.
        concepts: n rows each.
        weights: of each concept, w_i of each picture.
    """
    n, parts = len(negative.states), 1 + len(concepts)
    texts = stack_texts([negative, *concepts])
    scales = [torch.tensor(list(of))[:, None, None, None].to(texts.states) for of in weights]
    alone = len(concepts) == 1 and all(weight == 1 for weight in weights[0])
    forward = unet.forward

    def predict(
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        **kwargs,
    ) -> tuple[Tensor]:
        added = {}
        if texts.pooled is not None:
            times = (added_cond_kwargs or {})["time_ids"][-n:]
            added = {"text_embeds": texts.pooled, "time_ids": times.repeat(parts, 1)}
        out = forward(
            sample[:n].repeat(parts, 1, 1, 1),
            timestep,
            encoder_hidden_states=texts.states,
            added_cond_kwargs=added or added_cond_kwargs,
            **{**kwargs, "return_dict": False},
        )[0].chunk(parts)
        whole = out[1] if alone else compose(out[0], out[1:], scales)
        return (whole if len(sample) == n else torch.cat([out[0], whole]),)

    with forwarding(unet, predict):
        yield


@contextmanager
def forwarding(unet: UNet2DConditionModel, forward: Callable) -> Iterator[None]:
    """A block in which a UNet has another `forward`."""
    own = unet.__dict__.get("forward")
    unet.forward = forward
    try:
        yield
    finally:
        if own is None:
            del unet.forward
        else:
            unet.forward = own
