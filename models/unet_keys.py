"""Names of a Stable Diffusion UNet's parameters: diffusers' to those of single-file checkpoints.

The original layout numbers its blocks (`input_blocks.4.1.norm.weight`), diffusers names them
(`down_blocks.1.attentions.0.norm.weight`); with r layers per block and blocks counted from the outside,
down_blocks.B is input (r + 1) B + 1 and on, up_blocks.B is output (r + 1) B and on.
"""

import re

UNET_PREFIX = "model.diffusion_model."
_OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)")


def single_file_name(name: str, layers_per_block: int, attention: bool) -> str:
    """The single-file name of a parameter of diffusers' UNet2DConditionModel.

    Args:
        name: such as "down_blocks.0.resnets.1.conv1.weight".
        layers_per_block: the UNet's.
        attention: whether the parameter's block has cross-attention (which moves its upsampler by one).

    Raises:
        ValueError: no such parameter in Stable Diffusion's UNets.
    """
    for ours, theirs in _OUTER.items():
        if name.startswith(f"{ours}."):
            return UNET_PREFIX + theirs + "." + _inner(ours, name[len(ours) + 1 :])
    match = _BLOCK.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is not a parameter of a Stable Diffusion UNet")
    side, block, part, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    span = layers_per_block + 1
    if part == "downsamplers":
        return f"{UNET_PREFIX}input_blocks.{span * (block + 1)}.0.op.{rest.removeprefix('conv.')}"
    if part == "upsamplers":
        return f"{UNET_PREFIX}output_blocks.{span * block + layers_per_block}.{1 + attention}.{rest}"
    number = span * block + index + (side == "down")
    inner = 0 if part == "resnets" else 1
    return f"{UNET_PREFIX}{'input' if side == 'down' else 'output'}_blocks.{number}.{inner}.{_inner(part, rest)}"


def _inner(part: str, rest: str) -> str:
    if "resnets" not in part:
        return rest
    layer, _, kind = rest.partition(".")
    return f"{_RESNET[layer]}.{kind}"


def single_file_names(names: list[str], layers_per_block: int) -> dict[str, str]:
    """Single-file name of each of a UNet's parameters."""
    attentive = {name.rpartition(".attentions.")[0] for name in names if ".attentions." in name}

    def block(name: str) -> str:
        return ".".join(name.split(".")[:2])

    return {name: single_file_name(name, layers_per_block, block(name) in attentive) for name in names}
