"""Concepts merged by the command."""

from dataclasses import replace

import pytest
import torch
from finetuning import CHECKPOINT, train
from pack.models.errors import PersonalizeError
from pack.models.metadata import read_about
from pack.models.weight_files import read_safetensors, write_safetensors
from pack.training.merge_concepts import MergeConcepts, merge
from safetensors.torch import load_file


def test_a_file_with_numbers_that_are_not_finite_is_not_merged(root, folder, tmp_path):
    whole, _ = train("custom_diffusion", root, folder, tmp_path / "one", output_name="mine")
    tensors, metadata = read_safetensors(whole)
    next(iter(tensors.values())).fill_(float("nan"))
    whole.unlink()
    write_safetensors(whole, tensors, metadata)
    options = MergeConcepts(str(root / CHECKPOINT), [str(whole)], None, str(tmp_path / "out"))
    with pytest.raises(
        PersonalizeError, match=r" in mine\.safetensors has numbers that are not finite: its training dive"
    ):
        merge(options)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_merging_reads_the_layer_that_was_trained_with(root, folder, tmp_path):
    merged = []
    whole, word = train("custom_diffusion", root, folder, tmp_path / "one", output_name="mine", clip_skip=2)
    tensors, metadata = read_safetensors(whole)
    about = read_about(metadata, whole.name)
    assert about.settings["clip_skip"] == 2
    for skip in (2, 1):
        place = tmp_path / str(skip)
        write_safetensors(place / whole.name, tensors, replace(about, settings={"clip_skip": skip}).as_metadata())
        (place / word.name).write_bytes(word.read_bytes())
        path = merge(MergeConcepts(str(root / CHECKPOINT), [str(place / whole.name)], None, str(place / "out")))
        merged.append(load_file(path))
    assert all(not torch.equal(value, merged[1][key]) for key, value in merged[0].items())
