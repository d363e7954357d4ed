"""Train a LoRA: a small file that teaches SD1.5, SD2.x, SDXL or the pocket model your subject or style.

    python -m training.lora --pretrained_model_name_or_path MODEL --instance_data_dir PICTURES --output_dir FOLDER

W' = W + (alpha / rank) B A in the attention layers of the UNet, and if wanted of the text encoders (Hu et al. 2022).
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from .base_model import BaseModel
from .conditioning import Conditioning
from .methods import PRECISIONS, groups_of, shapes_of, text_modules
from .options import Lora
from .settings import Settings
from .shared import (
    UNET,
    About,
    PersonalizeError,
    check_lora,
    host_layers,
    lora_tensors,
    read_safetensors,
    text_prefixes,
    write_safetensors,
)

LAYERS = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "linear": ("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    "all": ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"),
}
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")


class LoraMethod:
    """LoRA, or DoRA, by peft."""

    name = "lora"
    conditioning: Conditioning | None = None

    def __init__(self, base: BaseModel, settings: Settings):
        self.base, self.settings = base, settings
        options: Lora = settings.method
        unet = base.pipeline.unet
        self.shapes = shapes_of(unet), [shapes_of(encoder) for encoder in base.text_encoders]
        for module in (unet, *base.text_encoders):
            module.requires_grad_(False)
        torch.manual_seed(settings.training.seed)
        unet.add_adapter(unet_config(options))
        cast_training_params(unet, dtype=torch.float32)
        self.text = text_modules(base) if settings.training.train_text_encoder else []
        for _, encoder in self.text:
            # transformers' add_adapter does this too, but 5.24 asks for a peft that is not released
            inject_adapter_in_model(text_config(options), encoder)
            cast_training_params(encoder, dtype=torch.float32)
        self.trains_text, self.groups = bool(self.text), groups_of(base, self.text, settings)
        self.writes_all = False

    def spoken(self, text: str) -> str:
        """The trigger is an ordinary word."""
        return text

    def write(self, folder: Path, name: str, about: About) -> list[Path]:
        """NAME.safetensors, in the naming of ComfyUI's loader."""
        networks = [(UNET, self.base.pipeline.unet)]
        networks += [
            (prefix, module) for prefix, (_, module) in zip(text_prefixes(len(self.text)), self.text, strict=True)
        ]
        tensors = tensors_of(networks)
        dtype = PRECISIONS[self.settings.output.save_precision]
        path = folder / f"{name}.safetensors"
        write_safetensors(path, {k: v.detach().cpu().to(dtype) for k, v in tensors.items()}, about.as_metadata())
        check_lora(read_safetensors(path)[0], host_layers(*self.shapes), path.name)
        return [path]


def tensors_of(networks: Sequence[tuple[str, nn.Module]], adapter: str = "default") -> dict[str, Tensor]:
    """The file's tensors of networks with peft's layers.

    Args:
        networks: each with the prefix of its names in files.
        adapter: peft's name of it.
    """
    tensors: dict[str, Tensor] = {}
    for prefix, network in networks:
        layers = {n: m for n, m in network.named_modules() if isinstance(m, LoraLayer)}
        alphas = {n: float(m.lora_alpha[adapter]) for n, m in layers.items() if adapter in m.lora_alpha}
        weights = {f"{n}.weight": m.get_base_layer().get_parameter("weight") for n, m in layers.items()}
        state = get_peft_model_state_dict(network, adapter_name=adapter)
        tensors |= lora_tensors(prefix, state, alphas, weights)
    return tensors


def unet_config(options: Lora) -> LoraConfig:
    """peft's configuration for the UNet.

    Raises:
        PersonalizeError: a block's rank is not written as BLOCK=RANK.
    """
    wanted = list(LAYERS)[: list(LAYERS).index(options.lora_layers) + 1]
    ranks, left_out = {}, []
    for text in options.block_ranks:
        block, _, rank = text.partition("=")
        if not re.fullmatch(r"(down_blocks|up_blocks)\.\d+|mid_block", block) or not rank.isdigit():
            raise PersonalizeError(
                f"block_ranks has {text!r}, but must be BLOCK=RANK, where BLOCK is mid_block, down_blocks.N or up_blocks.N."
            )
        pattern = re.escape(block) + r"\..*"
        if int(rank) == 0:
            left_out.append(pattern)
        else:
            ranks[pattern] = int(rank)
    alpha = options.lora_alpha if options.lora_alpha is not None else options.rank
    return LoraConfig(
        r=options.rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=options.lora_dropout,
        use_dora=options.use_dora,
        init_lora_weights="gaussian",
        target_modules=[layer for kind in wanted for layer in LAYERS[kind]],
        rank_pattern=ranks,
        alpha_pattern={pattern: alpha * rank / options.rank for pattern, rank in ranks.items()},
        exclude_modules="|".join(left_out) or None,
    )


def text_config(options: Lora) -> LoraConfig:
    """peft's configuration for a text encoder."""
    rank = options.text_encoder_rank or options.rank
    alpha = options.lora_alpha if options.lora_alpha is not None else options.rank
    return LoraConfig(
        r=rank,
        lora_alpha=alpha * rank / options.rank,  # type: ignore[arg-type]
        lora_dropout=options.lora_dropout,
        use_dora=options.use_dora,
        init_lora_weights="gaussian",
        target_modules=list(TEXT_LAYERS),
    )


if __name__ == "__main__":
    from .run import main

    sys.exit(main("lora", __doc__))
