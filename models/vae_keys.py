"""Names of a VAE's tensors: diffusers' AutoencoderKL to those of single-file checkpoints."""

import re
from collections.abc import Mapping

from torch import Tensor

PREFIX = "first_stage_model."
_PARTS = (
    (r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r"encoder.down.\1.block.\2."),
    (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"conv_norm_out\.", "norm_out."),
    (r"conv_shortcut\.", "nin_shortcut."),
    (r"(?<=attn_1\.)group_norm\.", "norm."),
    (r"(?<=attn_1\.)to_(q|k|v)\.", r"\1."),
    (r"(?<=attn_1\.)to_out\.0\.", "proj_out."),
)
_UP = re.compile(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.")


def vae_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An AutoencoderKL's tensors under their single-file names, where the attention's matrices are 1 x 1 convolutions."""
    last = max((int(match[1]) for name in state if (match := _UP.match(name))), default=0)

    def up(match: re.Match[str]) -> str:
        part = f"block.{match[3]}." if match[2] == "resnets" else "upsample."
        return f"decoder.up.{last - int(match[1])}.{part}"

    tensors = {}
    for name, value in state.items():
        single = _UP.sub(up, name)
        for ours, theirs in _PARTS:
            single = re.sub(ours, theirs, single)
        is_matrix = ".attn_1." in single and value.ndim == 2
        tensors[PREFIX + single] = value[..., None, None] if is_matrix else value
    return tensors


def tiny_vae_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A TAESD-shaped VAE's, whose decoder begins with a clamp that diffusers has no module for."""
    tensors = {}
    for name, value in state.items():
        side, _, number, rest = name.split(".", 3)
        tensors[f"{PREFIX}taesd_{side}.{int(number) + (side == 'decoder')}.{rest}"] = value
    return tensors
