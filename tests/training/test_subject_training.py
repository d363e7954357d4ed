"""Subject-Diffusion's trainer: what starts as the base, what trains, and what it says when something is wrong."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import extract_model_from_parallel
from finetuning import CHECKPOINT
from identity_sets import ENCODER
from pack.models.custom_diffusion import KEYS_AND_VALUES, is_trained
from pack.models.errors import PersonalizeError
from pack.models.metadata import read_about
from pack.models.subject_diffusion import PARTS, WORDS, read_subject_diffusion
from pack.models.weight_files import read_safetensors
from pack.training.base_model import load_base
from pack.training.image_encoder import load_image_encoder
from pack.training.pocket.subject_set import subject_scene, write_subjects
from pack.training.preflight import preflight
from pack.training.subject_data import METADATA, read_subjects
from pack.training.subject_diffusion import placeholder_of, spoken_of
from pack.training.subject_network import SubjectNetwork
from pack.training.watch import LABEL
from PIL import Image
from subject_sets import settings_of_subjects, train_subjects


@pytest.fixture(scope="module")
def trained(root, subject_set, tmp_path_factory):
    """Two steps at a high rate, with held-out pictures: the settings' folder."""
    folder = tmp_path_factory.mktemp("trained")
    held = folder / "held"
    write_subjects(held, 100, 2)
    values = {"validation_data_dir": str(held), "validation_prompt": ["a {entity} on the beach"], "validation_steps": 2}
    train_subjects(root, subject_set, folder / "out", learning_rate=1e-3, save_precision="fp32", **values)
    return folder / "out"


def test_it_starts_as_the_base_bit_for_bit(root):
    base = load_base(str(root / CHECKPOINT))
    unet, config = base.pipeline.unet, load_image_encoder(root / ENCODER).config
    x, text = torch.randn(2, 32, 8, 12), torch.randn(2, 77, 64)
    with torch.no_grad():
        expected = unet(x, 500, text).sample
        network = SubjectNetwork(unet, config.projection_dim, config.hidden_size, 64)
        network.attach(unet)
        assert torch.equal(unet(x, 500, text).sample, expected)
        network.conv_in.mask, network.seen = torch.rand(2, 1, 8, 12), torch.randn(2, 128, 64)
        assert torch.equal(unet(x, 500, text).sample, expected)
        network.conv_in.weight[:, -1] = 0.1
        located = unet(x, 500, text).sample
        assert not torch.equal(located, expected)
        network.adapters[0].alpha_attn.fill_(0.5)
        assert not torch.equal(unet(x, 500, text).sample, located)


def compiled(unet):
    return torch.compile(unet, backend="eager")


def prepared(unet):
    """As accelerate wraps it: its `forward` is another."""
    return Accelerator(cpu=True, mixed_precision="bf16").prepare(unet)


def unwrapped(unet):
    """And wrapped no more."""
    return extract_model_from_parallel(prepared(unet), keep_fp32_wrapper=False)


@pytest.mark.parametrize("wrapped", [lambda unet: unet, compiled, prepared, unwrapped])
@pytest.mark.parametrize("first", ["attach", "wrap"])
def test_attached_whatever_wraps_the_unet(root, wrapped, first, monkeypatch):
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # which other tests have set up otherwise
    torch.manual_seed(0)
    unet, config = load_base(str(root / CHECKPOINT)).pipeline.unet, load_image_encoder(root / ENCODER).config
    network = SubjectNetwork(unet, config.projection_dim, config.hidden_size, 64)
    x, text = torch.randn(1, 32, 8, 12), torch.randn(1, 77, 64)
    for adapter in network.adapters:
        adapter.alpha_attn.data.fill_(0.5)
        adapter.attn.to_out[0].weight.data.mul_(20)

    def same(one, other):
        return (one(x, 500, text).sample - other).abs().max() < 0.1  # in half precision

    with torch.no_grad():
        plain = unet(x, 500, text).sample
        outer = wrapped(unet) if first == "wrap" else unet
        back = network.attach(unet)
        if first == "attach":
            outer = wrapped(unet)
        network.seen = torch.randn(1, 128, 64)
        expected = unet(x, 500, text).sample
        assert (expected - plain).abs().max() > 0.5
        assert same(outer, expected)
        back.close()
        back.close()
        assert same(outer, plain)


def test_attached_once(root):
    unet = load_base(str(root / CHECKPOINT)).pipeline.unet
    keys, (one, other) = unet.state_dict().keys(), (SubjectNetwork(unet, 8, 8, 4) for _ in range(2))
    back = one.attach(unet)
    for network in (one, other):
        with pytest.raises(ValueError, match="take the parts out that it has"):
            network.attach(unet)
    back.close()
    assert unet.state_dict().keys() == keys
    with other.attach(unet):
        assert unet.conv_in is other.conv_in
    assert not unet._forward_pre_hooks
    assert "forward" not in vars(unet)


def test_what_trains_is_in_the_file(root, subject_set, trained):
    base, file = load_base(str(root / CHECKPOINT)), read_subject_diffusion(trained / "subject_diffusion.safetensors")
    unet, text = base.pipeline.unet.state_dict(), base.text_encoders[0].state_dict()
    kv = {name for name in unet if is_trained(name.rpartition(".")[0], KEYS_AND_VALUES)}
    assert file.unet.keys() == kv
    table = next(name for name in text if name.endswith(WORDS))
    assert file.text.keys() == text.keys() - {table}
    for name in kv:
        assert not torch.equal(file.unet[name], unet[name].float())
    moved = [name for name in file.text if not torch.equal(file.text[name], text[name].float())]
    assert len(moved) > len(text) // 2
    said = {spoken_of(one, 2) for one in read_subjects(subject_set)} | {""}
    spoken = {token for caption in said for token in base.pipeline.tokenizer(caption).input_ids}
    placeholder = placeholder_of(base)
    rows = file.words.index.tolist()
    assert len(rows) > 10
    assert set(rows) <= spoken - {placeholder}, "words that never come up stay as they are"
    first = file.parts["conv_in.weight"]
    assert first.shape[1] == unet["conv_in.weight"].shape[1] + 1
    assert first[:, -1].abs().max() > 0
    gates = [value for name, value in file.parts.items() if name.endswith("alpha_attn")]
    assert len(gates) == 10
    assert all(gate != 0 for gate in gates)
    assert file.about.method == "subject_diffusion"


def test_it_is_watched(trained):
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert any("validation_loss" in line for line in lines)
    sheet = Image.open(trained / "samples" / "step-0000002.png")
    sizes = [Image.open(path).size for path in sorted((trained.parent / "held" / "pictures").iterdir())]
    assert sheet.height == sum(height + LABEL for _, height in sizes), "as large as the held-out pictures"


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_left_out(root, subject_set, tmp_path, part):
    (path,) = train_subjects(root, subject_set, tmp_path, without=[part], max_train_steps=2, learning_rate=1e-3)
    parts = read_subject_diffusion(path).parts
    location = parts["conv_in.weight"][:, -1].abs().max() > 0
    gates = any(float(value) != 0 for name, value in parts.items() if name.endswith("alpha_attn"))
    assert (bool(location), gates) == (part != "location control", part != "adapter")


def test_without_changed_views(root, subject_set, tmp_path):
    (path,) = train_subjects(root, subject_set, tmp_path, augmentations=0, max_train_steps=1)
    assert not read_subject_diffusion(path).without


def test_true_boxes_and_masks(subject_set):
    pictures = read_subjects(subject_set)
    assert {len(one.subjects) for one in pictures} == {1, 2}
    for number, one in enumerate(pictures):
        scene = subject_scene(number)
        for subject, entity, place in zip(scene.subjects, one.subjects, scene.places, strict=True):
            left, _, right, _ = entity.box
            assert entity.entity == subject.identity.kind
            assert abs((left + right) / 2 - place) < 0.12
    before = (subject_set / METADATA).read_text()
    assert write_subjects(subject_set, 0, 6) == 6
    assert (subject_set / METADATA).read_text() == before, "what is there is left as it is"


def test_what_is_wrong_is_told(root, subject_set, tmp_path):
    def told(**values):
        with pytest.raises(PersonalizeError) as error:
            preflight(settings_of_subjects(root, subject_set, tmp_path / "out", **values), quiet=True)
        return str(error.value)

    assert told(image_encoder=None) == (
        "--image_encoder is missing: the CLIP image encoder, as in ComfyUI's models/clip_vision."
    )
    assert "are 1.1 together: less than 1." in told(text_dropout=0.5, subject_dropout=0.5, both_dropout=0.1)
    with pytest.raises(PersonalizeError, match=r"^backgrounds is 2\.0, but must be at most 1\.$"):
        settings_of_subjects(root, subject_set, tmp_path, backgrounds=2.0)
    assert "is no file of Subject-Diffusion" in told(subject_diffusion=str(root / ENCODER))
    assert "has no metadata.jsonl" in told(instance_data_dir=str(tmp_path))
    lines = [json.loads(line) for line in (subject_set / METADATA).read_text().splitlines()]
    for part in ("pictures", "masks", "crops"):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / part).symlink_to(subject_set / part)
    lines[0]["text"] += ", a sks"
    (tmp_path / "other" / METADATA).write_text("\n".join(map(json.dumps, lines)))
    assert 'The caption of 0000000.png has the placeholder "sks"' in told(instance_data_dir=str(tmp_path / "other"))


def test_masks_and_boxes_that_do_not_fit_are_told(root, subject_set, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(subject_set, data)
    pictures = read_subjects(data)[:4]
    first, second, third = (one.subjects[0] for one in pictures[:3])
    Image.new("L", Image.open(first.mask).size, 0).save(first.mask)
    Image.new("L", (31, 77), 255).save(second.mask)
    lines = [json.loads(line) for line in (data / METADATA).read_text().splitlines()]
    lines[2]["subjects"][0]["box"] = [0.0, 0.0, 0.1, 0.1]
    (data / METADATA).write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(PersonalizeError) as error:
        preflight(settings_of_subjects(root, data, tmp_path / "out"), quiet=True)
    said, names = str(error.value).splitlines(), [one.path.name for one in pictures]
    width, height = Image.open(pictures[1].path).size
    assert said == [
        f'The mask {first.mask.name} of {names[0]} is empty: white is where "{first.entity}" is.',
        f"The mask {second.mask.name} of {names[1]} is 31 x 77, the picture {width} x {height}: they must be of one size.",
        f'The mask {third.mask.name} of {names[2]} shows "{third.entity}" elsewhere than its box [0.0, 0.0, 0.1, 0.1].',
    ]


def test_captions_longer_than_clip_reads_are_left_out(root, subject_set, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(subject_set, data)
    lines = [json.loads(line) for line in (data / METADATA).read_text().splitlines()]
    lines[1]["text"] += ", very" * 40
    (data / METADATA).write_text("\n".join(map(json.dumps, lines)))
    settings = settings_of_subjects(root, data, tmp_path / "out", max_train_steps=3, train_batch_size=len(lines) - 1)
    (warning,) = preflight(settings, quiet=True).warnings
    assert warning.startswith(f"1 caption in {data} is too long with its subjects, and is left out: CLIP reads 77")
    (path,) = train_subjects(root, data, tmp_path / "out", max_train_steps=3, train_batch_size=len(lines) - 1)
    assert read_about(read_safetensors(path)[1], path.name).extra["ss_num_train_images"] == str(len(lines) - 1)
    for line in lines:
        line["text"] += ", very" * 40
    (data / METADATA).write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(PersonalizeError, match=f"^All captions in {data} are too long with their subjects: CLIP reads"):
        preflight(settings, quiet=True)


def test_what_does_nothing_is_told(root, subject_set, tmp_path):
    settings = settings_of_subjects(root, subject_set, tmp_path / "out", random_flip=True, masked_loss=True)
    warnings = preflight(settings, quiet=True).warnings
    assert [warning.split(" has")[0] for warning in warnings] == ["--random_flip", "--masked_loss"]


def test_wrong_parts_are_told(root, subject_set, tmp_path):
    with pytest.raises(PersonalizeError, match="without is 'legs', but must be one of location control, boxes"):
        settings_of_subjects(root, subject_set, tmp_path, without=["legs"])


def test_copies_to_validate_on_and_nothing_to_validate_on_are_told(root, subject_set, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(subject_set, copy)

    def warned(**values):
        return preflight(settings_of_subjects(root, subject_set, tmp_path / "out", **values), quiet=True).warnings

    count = len(read_subjects(copy))
    (said,) = warned(validation_data_dir=str(copy), validation_steps=7)
    assert said.startswith(f"{count} of the {count} pictures from {copy} to validate on are copies")
    (said,) = warned(validation_prompt=["a {entity}"], validation_steps=7)
    assert said.endswith("because nothing is validated: set --validation_data_dir.")
