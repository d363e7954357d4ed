"""Training an IP-Adapter: bad input is told before anything loads, and what is left out is said."""

import shutil
from functools import partial

import pytest
from identity_sets import ADAPTER, ENCODER, POCKET, identities, settings_of, train
from narrow_models import narrow_folder
from pack.models.errors import PersonalizeError
from pack.training.pocket.photos import write_identities
from pack.training.preflight import preflight
from PIL import Image
from safetensors.torch import load_file, save_file


def refused(root, folder, output, **values):
    with pytest.raises(PersonalizeError) as caught:
        preflight(settings_of(root, folder, output, **values), quiet=True)
    return str(caught.value)


def warnings_of(root, folder, output, **values):
    return preflight(settings_of(root, folder, output, **values), quiet=True).warnings


def test_what_is_wrong_is_told_before_anything_loads(root, people, tmp_path):
    folder = tmp_path / "people"
    shutil.copytree(people, folder)
    broken = sorted(next(folder.iterdir()).glob("*.png"))[0]
    broken.write_bytes(b"no picture")
    Image.new("RGB", (1, 1)).save(broken.with_name("tiny.png"))
    message = refused(
        root,
        folder,
        tmp_path / "out",
        image_encoder=None,
        ip_adapter=str(tmp_path / "gone.safetensors"),
        aggregator_width=10,
        aggregator_heads=4,
        text_dropout=0.5,
        both_dropout=0.5,
        largest_crop=0.2,
    )
    for sentence in (
        "--image_encoder is missing",
        "gone.safetensors",
        "--aggregator_width 10 does not divide into --aggregator_heads 4",
        "are 1.05 together: less than 1",
        "--smallest_crop 0.35 and --largest_crop 0.2 are not the smaller first, and at most 1.",
        f"{broken.name} in {broken.parent} cannot be read as a picture",
        f"tiny.png in {broken.parent} is 1x1 pixels: at least 16 on each side are needed.",
    ):
        assert sentence in message
    assert not (tmp_path / "out" / "config.toml").exists()


def test_files_in_the_wrong_place_are_named(root, people, tmp_path):
    told = refused(root, people, tmp_path / "out", image_encoder=str(root / ADAPTER), ip_adapter=str(root / ENCODER))
    assert "pocket_portraits_ip_adapter.safetensors is no image encoder that is supported" in told
    assert "is an image encoder, not an IP-Adapter: its place is models/clip_vision, for its own loader." in told
    told = refused(root, people, tmp_path / "out", aggregation="max", train_adapter=False)
    assert told == "--no-train_adapter with --aggregation max leaves nothing to train."
    state = load_file(root / ADAPTER)
    wide = {k: v.repeat(1, 2) if k == "image_proj.proj.weight" else v for k, v in state.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    told = refused(root, people, tmp_path / "out", ip_adapter=str(tmp_path / "wide.safetensors"))
    assert "takes image features of width 192, but those of pocket_portraits_vision.safetensors have width 96" in told


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"distil_steps": 5}, "--distil_steps needs --distil_from: a trained base adapter."),
        ({"distil_from": ADAPTER}, "--distil_from is for a new adapter: give it or --ip_adapter."),
        ({"distil_from": ADAPTER, "ip_adapter": None}, "--distil_from needs --adapter_kind plus and --distil_steps."),
        (
            {"distil_from": ENCODER, "ip_adapter": None, "adapter_kind": "plus", "distil_steps": 5},
            "is an image encoder, not an IP-Adapter: its place is models/clip_vision, for its own loader.",
        ),
    ],
)
def test_whom_a_projection_cannot_learn_from(root, people, tmp_path, monkeypatch, options, sentence):
    monkeypatch.chdir(root)
    assert refused(root, people, tmp_path / "out", **options).endswith(sentence)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"adapter_kind": "base"}, "--adapter_kind would describe a new adapter, but --ip_adapter names one"),
        (
            {"adapter_kind": "plus", "resampler_depth": 4},
            "--adapter_kind and --resampler_depth would describe a new adapter, but --ip_adapter names one",
        ),
        (
            {"ip_adapter": None, "train_adapter": False},
            "--no-train_adapter needs --ip_adapter: a new adapter would stay as untrained as it is.",
        ),
        (
            {"warmup_steps": 4},
            "--distil_steps 0 and --warmup_steps 4 are more than the 3 steps of the training: it would end before they do",
        ),
        (
            {"ip_adapter": None, "resampler_depth": 2},
            "--resampler_depth is for --adapter_kind plus: give both or neither.",
        ),
    ],
)
def test_what_would_be_silently_passed_over(root, people, tmp_path, options, sentence):
    assert refused(root, people, tmp_path / "out", **options).startswith(sentence)


@pytest.mark.parametrize(
    ("options", "given"),
    [
        (
            {"aggregation": "average", "aggregator_heads": 8, "aggregator_lr": 1e-3},
            "--aggregator_heads and --aggregator_lr",
        ),
        (
            {"aggregation": "concatenate", "aggregation_stage": "features", "aggregator_depth": 0},
            "--aggregator_depth and --aggregation_stage",
        ),
    ],
)
def test_a_pooling_has_no_options_of_self_attention(root, people, tmp_path, options, given):
    """Not refused, as a configuration with them must do with another --aggregation, too."""
    warnings = preflight(settings_of(root, people, tmp_path / "out", **options), quiet=True).warnings
    assert warnings == [f"With --aggregation {options['aggregation']} there is no effect of {given}."]


def test_a_self_attention_in_the_file_stays_as_it_is(root, people, tmp_path):
    """It stands at the tokens, 64 wide, with eight heads and two blocks."""
    file = {"ip_adapter": str(root / POCKET / "ipadapter" / "pocket_self_attention.safetensors")}
    own = {"aggregation_stage": "tokens", "aggregator_width": 64, "aggregator_heads": 8, "aggregator_depth": 2}
    told = refused(
        root, people, tmp_path / "out", **file, aggregation_stage="features", aggregator_heads=4, aggregator_width=64
    )
    assert told == (
        "pocket_self_attention.safetensors has a self-attention with --aggregation_stage tokens, --aggregator_heads 8, which "
        "you want otherwise: leave the options out or start from an adapter without one."
    )
    for options in ({}, own):
        assert preflight(settings_of(root, people, tmp_path / "out", **file, **options), quiet=True).warnings == []
    pooled = settings_of(root, people, tmp_path / "out", **file, aggregation="max", aggregation_stage="features")
    assert preflight(pooled, quiet=True).warnings == [
        "--aggregation max leaves the self-attention that pocket_self_attention.safetensors has out of the result."
    ]


def test_an_adapter_for_another_base_is_told(root, people, tmp_path):
    base = narrow_folder("sd15", tmp_path / "sd15")
    with pytest.raises(
        PersonalizeError, match=r"is made for the pocket model \(\d+ cross-attention layers.*use an adapter"
    ):
        train(root, people, tmp_path / "out", pretrained_model_name_or_path=str(base), resolution=64)


def test_what_is_left_out_or_without_effect_is_said(root, tmp_path):
    folder = write_identities(tmp_path / "people", 5000, 2, 3)[0].parent
    lonely = folder / "lonely"
    lonely.mkdir()
    shutil.copy(next(folder.glob("*/*.png")), lonely / "1.png")
    shutil.copy(lonely / "1.png", folder / "loose.png")
    own = next(folder.glob("*/*.png"))
    shutil.copy(own, own.with_name("zz.png"))
    warnings = preflight(
        settings_of(
            root,
            folder,
            tmp_path / "out",
            train_text_encoder=True,
            caption_dropout=0.1,
            masked_loss=True,
            trigger="sks",
            aggregation="average",
            warmup_steps=1000,
            warmup_loss_weight=1.0,
            smallest_crop=0.2,
            validation_prompt=["a {class}"],
        ),
        quiet=True,
    ).warnings
    told = "\n".join(warnings)
    assert "1 of the identities in" in told
    assert "(lonely)" in told
    assert "1 picture is in no identity's folder (loose.png)" in told
    assert "--train_text_encoder has no effect: an IP-Adapter trains beside a base" in told
    assert "--caption_dropout has no effect" in told
    assert f"1 picture is a copy of another of the same identity ({own.parent.name}/zz.png) and is left out" in told
    assert told.count("--masked_loss") == 1
    assert "--masked_loss has no effect on 2 of the 2 identities in people: none of their pictures has" in told.replace(
        str(folder), "people"
    )
    assert "of the 2 in people none is held out" in told.replace(str(folder), "people")
    assert "--trigger has no effect: an IP-Adapter trains" in told
    for name in ("warmup_steps", "warmup_loss_weight"):
        assert f"--{name} has no effect without --aggregation self-attention." in told
    assert "--smallest_crop has no effect without --reference_crops." in told


def test_what_a_self_attention_alone_does_not_take_is_said(root, people, tmp_path):
    held = identities(tmp_path / "held", 1)
    options = {"reference_dropout": 0.2, "validation_data_dir": str(held), "validation_identities": 0}
    assert preflight(settings_of(root, people, tmp_path / "out", **options), quiet=True).warnings == [
        "--reference_dropout has no effect without --train_adapter.",
        "--validation_data_dir has no effect: --validation_identities 0 takes none of it.",
    ]


def test_what_is_validated_is_said_where_it_is_not_what_was_asked_for(root, people, tmp_path):
    held, copy = identities(tmp_path / "held", 2), tmp_path / "copy"
    shutil.copytree(people, copy)
    for picture in held.glob("*/*.png"):
        Image.open(picture).rotate(180).save(picture)

    warned = partial(warnings_of, root, people, tmp_path / "out")
    idle = "--validation_steps 7 says only how often loss.png is drawn, because nothing is validated: set "
    assert warned(validation_steps=7) == [idle + "--validation_identities."]
    assert idle + "--validation_identities." in warned(
        validation_steps=7, validation_data_dir=str(held), validation_identities=0
    )
    assert warned(validation_steps=7, validation_identities=1) == []
    assert warned(validation_steps=7, validation_data_dir=str(held), validation_identities=2) == []
    assert warned(validation_data_dir=str(held), validation_identities=50) == [
        f"--validation_identities 50 are more than {held} has: its 2 are taken."
    ]
    (said,) = warned(validation_data_dir=str(copy), validation_identities=2)
    assert said.startswith(f"8 of the 8 pictures from {copy} to validate on are copies of pictures that are trained on")


def test_one_reference_teaches_a_self_attention_nothing_of_several(root, people, tmp_path):
    warned = partial(warnings_of, root, people, tmp_path / "out")
    (said,) = warned(max_references=1)
    assert said.startswith("--max_references 1 shows the self-attention one reference in every step")
    assert warned(max_references=2) == warned(max_references=1, aggregation="average") == []
