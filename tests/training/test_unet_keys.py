"""Our names of single-file UNets against diffusers' conversion in the other direction."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from pack.models.unet_keys import single_file_name, single_file_names


@pytest.mark.parametrize(("family", "count"), [("sd15", 686), ("sdxl", 1680), ("pocket", 344)])
def test_every_name_comes_back(root, family, count):
    config = json.loads((root / "training" / "configs" / family / "unet" / "config.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    names = list(unet.state_dict())
    assert len(names) == count
    ours = single_file_names(names, config["layers_per_block"])
    assert len(set(ours.values())) == count
    numbered = {ours[name]: torch.full((1,), i) for i, name in enumerate(names)}
    theirs = convert_ldm_unet_checkpoint(numbered, unet.config)
    assert {name: int(value) for name, value in theirs.items()} == {name: i for i, name in enumerate(names)}


def test_another_models_parameter():
    with pytest.raises(ValueError, match="transformer_blocks"):
        single_file_name("transformer_blocks.0.attn.to_q.weight", 2, False)
