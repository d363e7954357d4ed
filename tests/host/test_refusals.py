"""What comes broken to a node is told in a sentence: nothing on a wire, empty and impossible pictures, damaged weights."""

import inspect

import pytest
import torch
from inprocess import node
from pack.models.weight_files import read_safetensors, write_safetensors

GREY = torch.rand(2, 32, 24, 1, generator=torch.Generator().manual_seed(0))
NAN = torch.full((1, 32, 32, 3), float("nan"))
BOX = ("dog", 0.25, 0.25, 0.5, 0.5)


def refused(host, name, *given, **named):
    with pytest.raises(host.module("models.errors").PersonalizeError) as error:
        node(host, name)(*given, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_nothing_on_a_wire_that_is_needed(host):
    """As a checkpoint without a text encoder gives it, or a loader whose own input was left out."""
    told = 0
    for one in host.module("nodes").NODES:
        parameters = inspect.signature(one.execute).parameters.values()
        needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        for name in needed:
            if name == "clip_vision":
                continue  # which is told with what to do about it
            said = refused(host, one.GET_SCHEMA().node_id.removeprefix("Personalize"), **{name: None})
            assert said.startswith(f"{name} is empty: the node that it comes from has none. ")
            told += 1
    assert told > 50


def test_a_lora_s_own_empty_clip_goes_nowhere(host, loaded):
    _, clip, _ = node(host, "LoadLoRA")(loaded[0], "pocket_woman_lora.safetensors", 1.0, 0.0)
    assert clip is None
    assert refused(host, "ComposePrompt", loaded[0], clip, "a cat AND a dog", []).startswith(
        "clip is empty: the node that it comes from has none"
    )


def test_pictures_that_are_none(host, loaded, clip_vision):
    empty = torch.zeros(0, 32, 32, 3)
    for batch, sentence in ((empty, "row0 has no pictures"), (NAN, "row0 has values that are not numbers")):
        assert refused(host, "ContactSheet", {"row0": batch}).startswith(sentence)
    assert refused(host, "ScoreImages", empty, clip_vision, clip=loaded[1], prompt="a").startswith(
        "pictures has no pictures"
    )
    colour = GREY.expand(-1, -1, -1, 3)
    grey, same = (node(host, "ContactSheet")({"row0": some}, references=some)[0] for some in (GREY, colour))
    assert torch.equal(grey, same)


def test_a_subject_s_pictures_and_masks_that_are_none(host):
    picture, mask = torch.rand(1, 32, 32, 3), torch.ones(32, 32)
    for image, named, sentence in (
        (torch.zeros(0, 32, 32, 3), {}, 'The picture of "dog" has no pictures: check the node it comes from.'),
        (NAN, {}, 'The picture of "dog" has values that are not numbers (NaN or infinite): check the node before.'),
        (picture[:, :1, :1], {}, 'The picture of "dog" is 1x1 pixels: at least 16 on each side are needed.'),
        (picture[0], {}, 'The picture of "dog" has the shape (32, 32, 3), but pictures are [batch, height, width, 3]'),
        (picture, {"mask": mask[None][:0]}, 'A mask of "dog" has the shape (0, 32, 32): check the node it comes from.'),
        (
            picture,
            {"place": mask[None][:0]},
            'A mask of "dog" has the shape (0, 32, 32): check the node it comes from.',
        ),
    ):
        assert refused(host, "Subject", *BOX, image, **named).startswith(sentence)
    ((one,),) = node(host, "Subject")(*BOX, GREY, mask=torch.ones(32, 24), place=mask)
    assert one.image.shape == (32, 24, 3)
    assert one.box == (0, 0, 1, 1)


@pytest.mark.parametrize(
    ("kind", "name", "loader", "more"),
    [
        ("loras", "pocket_woman_lora", "LoadLoRA", (1.0, 0.0)),
        ("embeddings", "pocket_woman_embedding", "LoadTextualInversion", (1.0,)),
        ("loras", "pocket_woman.delta", "LoadDreamBooth", ()),
        ("ipadapter", "pocket_single", "LoadIPAdapter", None),
        ("subject_diffusion", "pocket_subject_diffusion", "LoadSubjectDiffusion", None),
        ("clip_vision", "pocket_portraits_vision", "LoadImageEncoder", None),
    ],
)
def test_weights_that_are_not_finite(host, root, loaded, kind, name, loader, more):
    (shipped,) = (root / "models" / "pocket" / kind).glob(f"{name}*.safetensors")
    tensors, metadata = read_safetensors(shipped)
    wrong = next(key for key in tensors if tensors[key].is_floating_point())
    tensors[wrong] = torch.full_like(tensors[wrong], float("nan"))
    path = host.base / "models" / kind / f"diverged_{kind}.safetensors"
    path.parent.mkdir(exist_ok=True)
    write_safetensors(path, tensors, metadata)
    if loader == "LoadDreamBooth":
        said = refused(host, loader, path.name, 1.0, loaded[0], loaded[1])
    else:
        said = refused(host, loader, path.name) if more is None else refused(host, loader, loaded[0], path.name, *more)
    path.unlink()
    assert said == f"{wrong} in {path.name} has numbers that are not finite: its training diverged, train it again."


def test_embeds_that_are_none(host, loaded, root):
    (adapter,) = node(host, "LoadIPAdapter")(next((root / "models/pocket/ipadapter").glob("*.safetensors")).name)
    for embeds, sentence in (
        (torch.zeros(0, 17, 128), "These EMBEDS are of no picture: check the node before."),
        (torch.full((1, 17, 128), float("inf")), "These EMBEDS have values that are not numbers (NaN or infinite)"),
    ):
        assert refused(host, "ApplyIPAdapter", loaded[0], adapter, embeds, 1.0, negative=embeds).startswith(sentence)


def test_a_lora_is_no_dreambooth(host, root):
    path = host.base / "models" / "checkpoints" / "a_lora.safetensors"
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(root / "models" / "pocket" / "loras" / "pocket_woman_lora.safetensors")
    assert (
        refused(host, "LoadDreamBooth", path.name, 1.0)
        == "a_lora.safetensors is a LoRA, not a DreamBooth checkpoint: its place is models/loras, for its own loader."
    )
    path.unlink()
