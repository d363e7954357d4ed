"""Checkpoints with replaced tensors, differences, learned words, metadata."""

import re

import pytest
import torch
from pack.models.base_models import FINGERPRINTED, fingerprint, same_model
from pack.models.checkpoints import check_tensors, overwrite_tensors, read_header
from pack.models.delta import check_delta, delta_tensors, truncated_delta_tensors
from pack.models.errors import PersonalizeError
from pack.models.metadata import About, folder_of, read_about
from pack.models.textual_inversion import LearnedWord, read_word, word_tensors
from pack.models.weight_files import read_safetensors, write_safetensors
from safetensors.torch import load_file, save_file
from torch import nn


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "base.safetensors"
    tensors = {
        "a.weight": torch.randn(3, 4).half(),
        "b.bias": torch.randn(5),
        "c": torch.randn(2, 2).bfloat16(),
        "v_pred": torch.zeros(0),
        "d": torch.arange(7),
    }
    save_file(tensors, path, {"who": "me", "kept": "yes"})
    return path


def test_everything_else_stays_byte_for_byte(source, tmp_path):
    target = tmp_path / "new" / "trained.safetensors"
    trained = {"a.weight": torch.full((3, 4), 0.1), "c": torch.ones(2, 2)}
    overwrite_tensors(source, target, trained, {"who": "you"})
    before, after = load_file(source), load_file(target)
    assert list(before) == list(after)
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        if name not in trained:
            assert after[name].numpy().tobytes() == value.numpy().tobytes()
    assert torch.equal(after["a.weight"], trained["a.weight"].half())
    assert torch.equal(after["c"], trained["c"].bfloat16())
    header, metadata, start = read_header(target)
    assert metadata == {"who": "you", "kept": "yes"}
    assert start % 8 == 0
    old, _, old_start = read_header(source)
    assert header == old
    data, old_data = target.read_bytes()[start:], source.read_bytes()[old_start:]
    assert len(data) == len(old_data)
    for name, entry in old.items():
        begin, end = entry["data_offsets"]
        assert (data[begin:end] == old_data[begin:end]) == (name not in trained or begin == end)
    assert [path.name for path in target.parent.iterdir()] == ["trained.safetensors"]


def test_what_was_written_is_checked(source):
    tensors = load_file(source)
    check_tensors(
        source, {"a.weight": tensors["a.weight"].float(), "b.bias": tensors["b.bias"], "v_pred": tensors["v_pred"]}
    )
    for name, value in {
        "b.bias": tensors["b.bias"] + 1e-6,
        "c": tensors["c"].float() + 0.5,
        "e": torch.ones(2),
    }.items():
        with pytest.raises(PersonalizeError, match=f"^{name} in .* is not what was trained"):
            check_tensors(source, {"a.weight": tensors["a.weight"], name: value})


def test_what_cannot_be_overwritten(source, tmp_path):
    target = tmp_path / "trained.safetensors"
    with pytest.raises(PersonalizeError, match=r"^base\.safetensors has no z: it is not the base that was trained\.$"):
        overwrite_tensors(source, target, {"z": torch.ones(1)}, {})
    with pytest.raises(PersonalizeError, match=r"^c is \(3, 2\) after training, but \(2, 2\) in base\.safetensors\.$"):
        overwrite_tensors(source, target, {"c": torch.ones(3, 2)}, {})
    with pytest.raises(PersonalizeError, match="is the base model itself"):
        overwrite_tensors(source, source, {}, {})
    source.write_bytes(source.read_bytes()[:20])
    with pytest.raises(
        PersonalizeError, match=r"^base\.safetensors in .* is damaged or cut short \(20 bytes; .*\): download"
    ):
        overwrite_tensors(source, target, {}, {})
    assert not target.exists()


@pytest.mark.parametrize("read", [read_header, read_safetensors])
@pytest.mark.parametrize(
    "content", [b"", b"<html>", b"<html>404 Not Found</html>", b"\x02\0\0\0\0\0\0\0[]", b"\0" * 8, b"\xff" * 20]
)
def test_a_damaged_file_is_one_sentence_wherever_it_is_read(read, content, tmp_path):
    path = tmp_path / "own.safetensors"
    path.write_bytes(content)
    begin = rf"^own\.safetensors in {re.escape(str(tmp_path))} is damaged or cut short \({len(content)} bytes; "
    with pytest.raises(PersonalizeError, match=begin + r"[^\n]+\): download it again\.$"):
        read(path)


@pytest.mark.parametrize("read", [read_header, read_safetensors])
def test_a_file_that_is_not_there_or_a_folder(read, tmp_path):
    with pytest.raises(PersonalizeError, match=r"^gone\.safetensors is not in "):
        read(tmp_path / "gone.safetensors")
    with pytest.raises(PersonalizeError, match=r" is a folder: name the file in it\.$"):
        read(tmp_path)


def changes():
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(40, 3, generator=generator) @ torch.randn(3, 30, generator=generator)
    return {
        "diffusion_model.x.weight": low,
        "diffusion_model.x.bias": torch.randn(40, generator=generator),
        "diffusion_model.conv.weight": 0.01 * torch.randn(8, 6, 3, 3, generator=generator),
        "diffusion_model.same.weight": torch.zeros(5, 5),
    }


def test_a_difference_is_named_as_the_stock_loader_wants_it():
    tensors = delta_tensors(changes())
    assert set(tensors) == {"diffusion_model.x.diff", "diffusion_model.x.diff_b", "diffusion_model.conv.diff"}
    assert torch.equal(tensors["diffusion_model.x.diff"], changes()["diffusion_model.x.weight"].half())


def test_a_difference_cut_to_a_size_keeps_the_most():
    whole = changes()
    budget = 40 * 2 + 3 * (40 + 30) * 2
    tensors, kept = truncated_delta_tensors(whole, budget)
    assert sum(value.numel() * 2 for value in tensors.values() if value.ndim) <= budget
    assert 0.99 < kept < 1
    up, down = (tensors[f"diffusion_model.x.lora_{side}.weight"] for side in ("up", "down"))
    assert tensors["diffusion_model.x.alpha"] == up.shape[1] == 3
    torch.testing.assert_close(up.float() @ down.float(), whole["diffusion_model.x.weight"], atol=2e-2, rtol=2e-2)
    assert not any("conv" in name for name in tensors)
    fewer, less = truncated_delta_tensors(whole, 40 * 2 + (40 + 30) * 2)
    assert less < kept
    assert fewer["diffusion_model.x.alpha"] == 1


def test_a_difference_that_fits_is_written_whole():
    tensors, kept = truncated_delta_tensors(changes(), (40 + 40 * 30 + 8 * 54) * 2)
    assert kept == 1
    assert tensors.keys() == delta_tensors(changes()).keys()


def test_a_budget_is_used():
    """A matrix that needs many singular values gets them, and is whole where they would cost as much."""
    torch.manual_seed(0)
    one, two = torch.linalg.qr(torch.randn(400, 400))[0], torch.linalg.qr(torch.randn(400, 200))[0]
    whole = {"flat.weight": 10 * one, "half.weight": two @ two.T, "conv.weight": 1e-2 * torch.randn(30, 20, 3, 3)}
    tensors, kept = truncated_delta_tensors(whole, (400 * 400 + 150 * 800 + 3 * 210) * 2)
    assert torch.equal(tensors["flat.diff"], whole["flat.weight"].half())
    assert tensors["half.alpha"] == 150
    assert tensors["conv.alpha"] == 3
    made = tensors["half.lora_up.weight"].float() @ tensors["half.lora_down.weight"].float()
    assert (made - whole["half.weight"]).square().sum() == pytest.approx(50, rel=1e-2)
    up, down = (tensors[f"conv.lora_{side}.weight"].float() for side in ("up", "down"))
    assert (up.shape, down.shape) == ((30, 3, 1, 1), (3, 20, 3, 3))
    u, s, v = torch.linalg.svd(whole["conv.weight"].flatten(1))
    best = (u[:, :3] * s[:3]) @ v[:3]
    torch.testing.assert_close(up.flatten(1) @ down.flatten(1), best, atol=1e-4, rtol=1e-2)
    length = sum(change.square().sum().item() for change in whole.values())
    assert (1 - kept) * length == pytest.approx(50 + s[3:].square().sum().item(), rel=1e-2)


def test_a_difference_is_checked_against_the_base():
    shapes = {name: tuple(change.shape) for name, change in changes().items()}
    whole = delta_tensors(changes())
    assert check_delta(whole, shapes, "x.safetensors") == len(whole)
    cut, _ = truncated_delta_tensors(changes(), (40 + 3 * 70) * 2)
    assert check_delta(cut, shapes, "x.safetensors") == 2
    for wrong in (
        {"diffusion_model.gone.diff": torch.zeros(3)},
        {"diffusion_model.x.diff": torch.zeros(3, 3)},
        {key: value for key, value in cut.items() if not key.endswith("alpha")},
        {"diffusion_model.x.oft": torch.zeros(3)},
    ):
        with pytest.raises(PersonalizeError, match=r"in x\.safetensors has no place in the base model"):
            check_delta(wrong, shapes, "x.safetensors")


def test_a_budget_that_is_too_small():
    with pytest.raises(PersonalizeError, match=r"^The difference cannot be cut to 7e-05 MB: .* need at least 0\.01 MB"):
        truncated_delta_tensors(changes(), 70)


def test_a_learned_word_leaves_all_other_rows_alone():
    table = nn.Embedding(10, 4)
    table.requires_grad_(False)
    before = table.weight.clone()
    word = LearnedWord(table, [10, 11], torch.randn(2, 4))
    ids = torch.tensor([[1, 10, 11, 9]])
    out = word(ids)
    assert torch.equal(out[0, [0, 3]], before[[1, 9]])
    assert torch.equal(out[0, 1:3], word.vectors)
    out.square().sum().backward()
    assert torch.equal(word.vectors.grad, 2 * word.vectors)
    assert [name for name, p in word.named_parameters() if p.requires_grad] == ["vectors"]
    assert torch.equal(table.weight, before)
    with pytest.raises(ValueError, match="follow each other"):
        LearnedWord(table, [9, 10], torch.randn(2, 4))


def test_words_of_any_tool():
    one, two = torch.randn(3, 768), torch.randn(3, 1280)
    assert set(word_tensors([one])) == {"emb_params"}
    assert set(word_tensors([one, two])) == {"clip_l", "clip_g"}
    for tensors in ({"emb_params": one}, {"<cat>": one}, {"clip_l": one}):
        assert torch.equal(read_word(tensors, (768,), "w", "SD1.5")[0], one)
    assert torch.equal(read_word({"<cat>": one[0]}, (768,), "w", "SD1.5")[0], one[:1])
    assert [v.shape[1] for v in read_word({"clip_g": two, "clip_l": one}, (768, 1280), "w", "SDXL")] == [768, 1280]
    with pytest.raises(
        PersonalizeError, match=r"^w has vectors of width 768, but SDXL needs 768 and 1280: it was made"
    ):
        read_word({"emb_params": one}, (768, 1280), "w", "SDXL")
    with pytest.raises(PersonalizeError, match="is not a Textual Inversion"):
        read_word({"x": torch.zeros(2, 3, 4)}, (768,), "w", "SD1.5")


def test_the_same_file_is_the_same_bytes(tmp_path):
    """safetensors orders metadata anew each time."""
    metadata = {f"key {i}": "grün" for i in range(20)}
    for name in ("a", "b"):
        write_safetensors(tmp_path / name, {"x": torch.ones(2)}, metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_safetensors(tmp_path / "a")[1] == metadata
    assert load_file(tmp_path / "a")["x"].tolist() == [1, 1]


def test_metadata_comes_back():
    about = About("lora", "sd15", "base", "ab", "cd", "ohwx", "dog", {"rank": 4}, {"ss_v2": "False"})
    assert read_about(about.as_metadata(), "a") == about
    assert read_about({"format": "pt"}, "a") is None
    with pytest.raises(PersonalizeError, match=r"^a has format 9, this version of Personalize reads format 1"):
        read_about({"personalize.method": "lora", "personalize.format": "9"}, "a")


@pytest.mark.parametrize(
    ("method", "trigger", "class_name", "settings", "called"),
    [
        ("lora", "ohwx", "dog", {}, "ohwx dog"),
        ("lora", "mr whiskers", "cat", {}, "mr whiskers cat"),
        ("dreambooth", "", "dog", {}, "dog"),
        ("dreambooth", "person", "person", {}, "person"),
        ("textual_inversion", "embedding:rex", "dog", {"learnable_property": "object"}, "embedding:rex"),
        ("textual_inversion", "embedding:ink", "person", {"learnable_property": "style"}, "embedding:ink"),
        (
            "custom_diffusion",
            "embedding:a_x dog, embedding:a_y mug",
            "dog, mug",
            {},
            "embedding:a_x dog, embedding:a_y mug",
        ),
        ("ip_adapter", "", "", {}, ""),
    ],
)
def test_what_prompts_call_a_subject_by(method, trigger, class_name, settings, called):
    assert About(method, trigger=trigger, class_name=class_name, settings=settings).call == called


def test_where_comfyui_finds_files():
    assert folder_of("dreambooth") == "checkpoints"
    assert folder_of("dreambooth", difference=True) == folder_of("custom_diffusion") == "loras"


def test_a_fingerprint_is_of_one_model_in_any_precision():
    torch.manual_seed(0)
    unet = {name: 0.1 * torch.randn(384) for name in FINGERPRINTED}
    precisions = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    read = {
        (stored, loaded): fingerprint({name: value.to(stored).to(loaded) for name, value in unet.items()})
        for stored in precisions
        for loaded in precisions
    }
    for one in read.values():
        assert all(same_model(one, other) for other in read.values())
    for bias, change in (("time_embed.0.bias", 0.01), ("out.2.bias", 0.001)):
        others = unet | {bias: unet[bias] + change}
        for loaded in precisions[: 4 if change == 0.01 else 3]:
            assert not same_model(
                read[torch.float32, torch.float32], fingerprint({k: v.to(loaded) for k, v in others.items()})
            )
    assert not same_model(read[torch.float32, torch.float32], "0123456789ab")


def test_others_may_read_a_file_as_they_may_any(tmp_path):
    write_safetensors(tmp_path / "ours.safetensors", {"x": torch.ones(2)}, {})
    (tmp_path / "plain").touch()
    assert (tmp_path / "ours.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
