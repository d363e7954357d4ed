"""CLIP, DINO and Inception of random weights see pictures as their own preprocessing has it, and are checked before."""

import json
import shutil

import numpy as np
import pytest
import torch
from measured_sets import PEOPLE, options
from pack.models.errors import PersonalizeError
from pack.training import features
from pack.training.encoding import Cache
from pack.training.evaluate import evaluate
from pack.training.pocket.attributes import sample_scene
from pack.training.pocket.data import identity
from pack.training.pocket.draw import draw
from pack.training.pocket.photos import SUBJECTS
from PIL import Image


def pictures_of(folder, sizes):
    """Drawings of several sizes, as files."""
    paths = []
    for i, size in enumerate(sizes):
        paths.append(folder / f"{i}.png")
        draw(sample_scene(np.random.default_rng(i), (identity(SUBJECTS, i),))).resize(size).save(paths[-1])
    return paths


def tiny_clip(folder, side=32, **framing):
    """A CLIPModel of random weights; its tokens are CLIP's."""
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    text = {**small, "bos_token_id": 49406, "eos_token_id": 49407}
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**small, "image_size": side, "patch_size": 8}, projection_dim=12)
    )
    model.save_pretrained(folder)
    if framing:
        (folder / "preprocessor_config.json").write_text(json.dumps(framing))
    return model.eval()


@pytest.mark.parametrize("said", [True, False], ids=["by its configuration", "without one"])
def test_clip_sees_and_reads_as_its_own_processor_has_it(tmp_path, no_network, said):
    pytest.importorskip("torchvision")
    from pack.training.clip_tokenizer import clip_tokenizer
    from transformers import CLIPImageProcessor

    mean, std = ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]) if said else (features.CLIP_MEAN, features.CLIP_STD)
    framing = {
        "size": {"shortest_edge": 40},
        "crop_size": {"height": 32, "width": 32},
        "image_mean": mean,
        "image_std": std,
    }
    model = tiny_clip(tmp_path / "clip", **(framing if said else {}))
    own = CLIPImageProcessor(**framing) if said else CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    paths = pictures_of(tmp_path, [(64, 64), (96, 64), (50, 70)])
    eye = features.clip(str(tmp_path / "clip"), Cache(tmp_path / "cache"), 2)
    seen = eye.pictures(paths, "test")["features"]
    texts = ["a dog on a beach", "a woman " + "very " * 90 + "happy"]
    ids = clip_tokenizer()(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        for row, path in zip(seen, paths, strict=True):
            pixels = own(Image.open(path), return_tensors="pt").pixel_values
            expected = model(**ids, pixel_values=pixels)
            torch.testing.assert_close(row / row.norm(), expected.image_embeds[0], rtol=0, atol=5e-3)  # 8 bit or not
        read = eye.texts(texts)
    torch.testing.assert_close(read / read.norm(dim=1, keepdim=True), expected.text_embeds, rtol=1e-4, atol=1e-5)


def test_dino_sees_as_its_authors_evaluate_it(tmp_path, no_network):
    transforms = pytest.importorskip("torchvision.transforms")
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ViTModel(ViTConfig(image_size=56, patch_size=8, **small), add_pooling_layer=False)
    model.save_pretrained(tmp_path / "dino")
    theirs = transforms.Compose(
        [
            transforms.ToTensor(),  # first, so that nothing is rounded to 8 bit in between
            transforms.Resize(64, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(56),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    paths = pictures_of(tmp_path, [(64, 64), (96, 80), (50, 70)])
    seen = features.dino(str(tmp_path / "dino"), Cache(tmp_path / "cache"), 2).pictures(paths, "test")["features"]
    with torch.no_grad():
        expected = torch.cat([model.eval()(theirs(Image.open(p))[None]).last_hidden_state[:, 0] for p in paths])
    torch.testing.assert_close(seen, expected, rtol=0, atol=5e-3)  # theirs overshoots 0..1


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """torch-fidelity's Inception with random weights, as a file."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = module.FeatureExtractorInceptionV3("random", ["2048"])
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def test_inception_is_torch_fidelitys(inception_weights, tmp_path, no_network):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    paths = pictures_of(tmp_path, [(64, 64), (64, 64), (96, 80)])
    seen = features.inception(str(inception_weights), Cache(tmp_path / "cache"), 3).pictures(paths, "test")
    theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(inception_weights))
    for i, path in enumerate(paths):
        expected = theirs(torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)[None])
        for name, row in zip(("features", "logits"), expected, strict=True):
            torch.testing.assert_close(seen[name][i], row[0], rtol=1e-4, atol=1e-5)
    assert (seen["features"].shape, seen["logits"].shape) == ((3, 2048), (3, 1008))


def test_photographs_are_measured_as_dreambench_has_it(sets, inception_weights, tmp_path, no_network):
    tiny_clip(tmp_path / "clip")
    asked = {"features": "inception", "inception_weights": str(inception_weights), "clip": str(tmp_path / "clip")}
    few = {name: shutil.copytree(folder, tmp_path / name) for name, folder in sets.items() if name != "bad"}
    for folder in few.values():
        for path in [*folder.glob("*/[23].png"), *(folder / str(i) for i in range(2, PEOPLE))]:
            path.unlink() if path.is_file() else shutil.rmtree(path)
    (few["good"] / "0" / "0.txt").unlink()
    result = evaluate(options(few, tmp_path / "out", ["good"], **asked))
    figures = result["figures"]["good"]
    assert set(figures) == {"fid", "kid", "wcfid", "bcfid", "is", "bcis", "uniform_is", "clip_i", "clip_t"}
    assert (figures["clip_i"]["pictures"], figures["clip_t"]["pictures"]) == (4, 3)
    assert any("2048 features need 2049" in remark for remark in result["remarks"])


@pytest.mark.parametrize("what", ["code", "another network", "safetensors"])
def test_weights_that_are_no_inception(sets, tmp_path, nothing_loads, what):
    path = tmp_path / ("weights.safetensors" if what == "safetensors" else "weights.pth")
    if what == "code":
        path.write_bytes(b"cposix\nsystem\n(S'exit 3'\ntR.")
    else:
        torch.save({"fc.weight": torch.zeros(2, 3)}, path)
    said = {
        "code": "holds Python code, which was not run",
        "another network": "it has no fc.weight of 1008 x 2048.",
        "safetensors": "must be a .pth file, as torch-fidelity reads it.",
    }[what]
    with pytest.raises(PersonalizeError, match=said):
        evaluate(options(sets, tmp_path / "out", features="inception", inception_weights=str(path)))


def test_a_clip_that_is_not_whole(sets, tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_clip(tmp_path / "clip")
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if k != "text_projection.weight"}, tmp_path / "clip" / "model.safetensors"
    )
    with pytest.raises(PersonalizeError, match="holds a model of type clip without text_projection"):
        evaluate(options(sets, tmp_path / "out", clip=str(tmp_path / "clip")))
