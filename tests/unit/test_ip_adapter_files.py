"""Recognising, reading and refusing files in models/ipadapter."""

import os
import shutil
from contextlib import suppress

import pytest
import torch
from pack.models.errors import PersonalizeError
from pack.models.ip_adapter import IPAdapter, read_ip_adapter, recognise
from pack.models.references import References
from safetensors.torch import save_file
from structural.adapters import (
    FACEID,
    PUBLISHED,
    adapter_shapes,
    faceid_shapes,
    random_adapter,
    save_adapter,
    view_tensors,
)


def views(shapes):
    return {part: view_tensors(inner) for part, inner in shapes.items()}


def small(kind="base", width=1024, cross=768):
    return random_adapter(kind, width, cross, [8] * 4)


def references(pooled=1024, patches=1280):
    return References(
        torch.randn(2, pooled), torch.randn(2, 5, patches), torch.randn(5, patches), torch.ones(2), ("a", "b")
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_layout_is_told_by_its_tensors(name, tmp_path):
    kind, width, cross, layers = PUBLISHED[name]
    path = save_adapter(views(adapter_shapes(kind, width, cross, layers)), tmp_path / "anything.bin")
    assert path.stat().st_size < 10e6
    variant = recognise(read_ip_adapter(path), path.name)
    assert (variant.kind, variant.encoder_width, variant.cross_width, variant.layers) == (
        kind,
        width,
        cross,
        len(layers),
    )
    assert variant.base_model == {768: "SD1.5", 2048: "SDXL"}[cross]
    assert ("bigG" in variant.encoder) is (kind == "base" and width == 1280)


@pytest.mark.parametrize("name", FACEID)
def test_faceid_is_told_and_not_supported_yet(name):
    with pytest.raises(PersonalizeError, match=r"FaceID.*not supported yet: use Plus-Face"):
        recognise(views(faceid_shapes(name)), f"{name}.bin")


def test_flat_and_nested_files_are_alike(tmp_path):
    state = small("plus", 1280)
    flat = read_ip_adapter(save_adapter(state, tmp_path / "a.safetensors"))
    nested = read_ip_adapter(save_adapter(state, tmp_path / "a.bin"))
    aliased = {"image_proj": state["image_proj"], "adapter_modules": state["ip_adapter"]}
    alias = read_ip_adapter(save_adapter(aliased, tmp_path / "b.bin"))
    for read in (flat, nested, alias):
        for part in ("image_proj", "ip_adapter"):
            assert read[part].keys() == state[part].keys()
            assert all(torch.equal(read[part][key], value) for key, value in state[part].items())


def test_building_does_no_random_initialisation():
    state = small("plus", 1280)
    before = torch.random.get_rng_state()
    adapter = IPAdapter.from_state(state)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert adapter.image_proj.latents.data_ptr() == state["image_proj"]["latents"].data_ptr()


def test_half_precision_files_give_float32_prompts():
    state = {part: {key: value.half() for key, value in inner.items()} for part, inner in small("plus", 1280).items()}
    prompt = IPAdapter.from_state(state).image_prompt(references())
    assert {tensor.dtype for tensor in prompt.keys + prompt.values} == {torch.float32}
    assert all(key.shape == (32, 8) for key in prompt.keys)


def test_wrong_encoder_is_told_with_both_widths_and_the_encoder_to_use():
    big = references(pooled=1280, patches=1664)
    for state, widths in ((small("plus", 1280), ("1280", "1664")), (small("base", 1024), ("1024", "1280"))):
        for ask in ("image_prompt", "empty_prompt"):
            if state["image_proj"].get("latents") is None and ask == "empty_prompt":
                continue  # a zero embedding needs no encoder
            with pytest.raises(PersonalizeError) as error:
                getattr(IPAdapter.from_state(state), ask)(big)
            assert all(width in str(error.value) for width in widths)
            assert "encode them with CLIP ViT-H" in str(error.value)
            assert "bigG" in str(error.value)


def refused(path, match):
    with pytest.raises(PersonalizeError, match=match) as error:
        read_ip_adapter(path)
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file(tmp_path):
    refused(tmp_path / "gone.safetensors", "is not in")
    refused(tmp_path / "gone.bin", "is not in")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_safetensors(tmp_path, keep):
    path = save_adapter(small(), tmp_path / "cut.safetensors")
    size = path.stat().st_size
    os.truncate(path, keep if isinstance(keep, int) else int(size * keep))
    refused(path, "damaged or cut short")


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.999])
def test_a_truncated_bin(tmp_path, keep):
    path = save_adapter(small(), tmp_path / "cut.bin")
    size = path.stat().st_size
    os.truncate(path, keep if isinstance(keep, int) else int(size * keep))
    refused(path, "damaged")


def test_a_pickle_without_names(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "list.bin")
    refused(tmp_path / "list.bin", r" holds a list, not named tensors\.$")


class Bomb:
    """Runs a command when it is unpickled without care."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_pickle_bomb_is_not_executed(tmp_path):
    marker = tmp_path / "exploded"
    path = tmp_path / "bomb.bin"
    torch.save({"image_proj": Bomb(marker), "ip_adapter": {}}, path)
    refused(path, "was not run")
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the bomb is a real one
    assert marker.exists()


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"lora_unet_down_blocks_0.lora_down.weight": torch.ones(2)}, "LoRA.*models/loras"),
        ({"unet.down_blocks.0.attn2.to_k.lora_A.weight": torch.ones(2)}, "LoRA"),
        ({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2)}, "checkpoint.*models/checkpoints"),
        ({"vision_model.embeddings.class_embedding": torch.ones(2)}, "image encoder.*models/clip_vision"),
        ({"control_model.input_hint_block.0.weight": torch.ones(2)}, "ControlNet.*models/controlnet"),
        ({"image_proj.proj.weight": torch.ones(2)}, r"is not a whole IP-Adapter: it has no ip_adapter tensors\.$"),
        ({"ip_adapter.1.to_k_ip.weight": torch.ones(2)}, r"is not a whole IP-Adapter: it has no image_proj tensors\.$"),
        (
            {"emb_params": torch.ones(2)},
            r"is a learned word, not an IP-Adapter: its place is models/embeddings, for its own loader\.$",
        ),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path, tensors, match):
    path = tmp_path / "other.safetensors"
    save_file(tensors, path)
    refused(path, match)


def test_a_file_that_holds_no_dict(tmp_path):
    torch.save(torch.ones(3), tmp_path / "tensor.bin")
    refused(tmp_path / "tensor.bin", "holds a Tensor")


def test_missing_parts_of_an_adapter(tmp_path):
    state = small("plus", 1280)
    del state["ip_adapter"]["3.to_v_ip.weight"]
    refused(save_adapter(state, tmp_path / "a.bin"), "lacks to_k_ip or to_v_ip")
    state = small("plus", 1280)
    del state["image_proj"]["layers.2.0.to_q.weight"]
    refused(save_adapter(state, tmp_path / "c.bin"), r"incomplete image projection.*layers\.2\.0\.to_q")
    unknown = small()
    unknown["image_proj"] = {"something.weight": torch.ones(2, 2)}
    refused(save_adapter(unknown, tmp_path / "b.bin"), "unknown kind")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: s["ip_adapter"].update({"1.to_k_ip.weight": torch.ones(8)}),
        lambda s: s["ip_adapter"].update({"1.to_k_ip.weight": "text"}),
        lambda s: s["image_proj"].update({"proj.weight": torch.ones(3072)}),
        lambda s: s["image_proj"].update({"norm.weight": torch.ones(4), "norm.bias": torch.ones(4)}),
        lambda s: s.update({"image_proj": {"latents": torch.ones(1, 16, 8), "proj_in.weight": torch.ones(8, 8)}}),
        lambda s: s.update({"image_proj": {1: torch.ones(2)}}),
        lambda s: s["ip_adapter"].update(
            {f"{n}.to_{p}_ip.weight": torch.ones(8, 64) for n in (1, 3, 5, 7) for p in "kv"}
        ),
    ],
)
def test_files_that_are_adapters_only_at_first_sight(tmp_path, spoil):
    state = small()
    spoil(state)
    refused(save_adapter(state, tmp_path / "odd.bin"), "odd.bin")


@pytest.mark.parametrize("content", [b"hi", b"\0" * 1000, b"<html>not found</html>", b"version https://git-lfs"])
def test_a_bin_that_is_something_else(tmp_path, content):
    path = tmp_path / "t.bin"
    path.write_bytes(content)
    refused(path, "damaged")


def test_damaged_bins_never_give_a_raw_error(tmp_path):
    whole = save_adapter(small(), tmp_path / "whole.bin").read_bytes()
    path = tmp_path / "flipped.bin"
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        data = bytearray(whole)
        head = int(torch.randint(0, 4000, (1,), generator=generator))
        data[head] ^= int(torch.randint(1, 255, (1,), generator=generator))
        path.write_bytes(data)
        with suppress(PersonalizeError):
            read_ip_adapter(path)


def test_writing_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "references.safetensors"
    first = references()
    first.save(path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        references().save(path)
    assert os.listdir(path.parent) == [path.name]
    assert torch.equal(References.load(path).pooled, first.pooled)


def test_references_survive_their_file(tmp_path):
    first = references().with_weights([1.0, 0.5])
    first.save(tmp_path / "r.safetensors")
    second = References.load(tmp_path / "r.safetensors")
    for name in ("pooled", "patches", "zero_patches", "weights"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert second.names == ("a", "b")
    save_adapter(small(), tmp_path / "adapter.safetensors")
    with pytest.raises(PersonalizeError, match="holds no references"):
        References.load(tmp_path / "adapter.safetensors")
    shutil.copy(tmp_path / "r.safetensors", tmp_path / "cut.safetensors")
    os.truncate(tmp_path / "cut.safetensors", 200)
    with pytest.raises(PersonalizeError, match="damaged"):
        References.load(tmp_path / "cut.safetensors")
