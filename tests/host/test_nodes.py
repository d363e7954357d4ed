"""The nodes as ComfyUI runs them: schemas, graphs, files, and what users do wrong."""

import os
import shutil
import weakref

import narrow
import pytest
import torch
from help_pages import DOCS, page_of
from inprocess import HostError
from pack.training.image_encoder import load_image_encoder
from PIL import Image
from safetensors.torch import save_file
from structural.adapters import PUBLISHED, adapter_shapes, view_tensors


@pytest.fixture
def encode(host, clip_vision):
    return lambda **inputs: host.node("PersonalizeEncodeReferences").execute(clip_vision, **inputs)


@pytest.fixture
def photos(host):
    """A folder of pictures in ComfyUI's input folder."""
    folder = host.base / "input" / "photos"
    folder.mkdir(exist_ok=True)
    for i, size in enumerate([(300, 200), (200, 300), (64, 64)]):
        Image.effect_noise(size, 60 + 40 * i).convert("RGB").save(folder / f"{i}.png")
    yield folder
    shutil.rmtree(folder)


def graph(photos="photos", **apply):
    """Checkpoint, references and adapter to a picture."""
    references = {"clip_vision": ["2", 0], "folder": photos, "weights": "", "framing": "crop"}
    applied = {"weight": 1.0, "aggregation": "average", "pooling": "before projection", "start_percent": 0.0}
    applied |= {"end_percent": 1.0, "layers": "all", "layer_list": ""} | apply
    sampler = {"seed": 1, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    links = {"model": ["5", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["8", 0]}
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "pocket_portraits.safetensors"}},
        "2": {"class_type": "PersonalizeLoadImageEncoder", "inputs": {"file": "pocket_portraits_vision.safetensors"}},
        "3": {"class_type": "PersonalizeLoadIPAdapter", "inputs": {"file": "plus.safetensors"}},
        "4": {"class_type": "PersonalizeEncodeReferences", "inputs": references},
        "5": {
            "class_type": "PersonalizeApplyIPAdapter",
            "inputs": {"model": ["1", 0], "ip_adapter": ["3", 0], "references": ["4", 0]} | applied,
        },
        "6": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a toy on a table"}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "8": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "9": {"class_type": "KSampler", "inputs": sampler | links},
        "10": {"class_type": "VAEDecode", "inputs": {"samples": ["9", 0], "vae": ["1", 2]}},
        "11": {"class_type": "SaveImage", "inputs": {"images": ["10", 0], "filename_prefix": "test"}},
    }


def picture(host, outputs, node="11"):
    return Image.open(host.base / "output" / outputs[node]["images"][0]["filename"]).tobytes()


def test_every_input_has_a_tooltip_and_every_node_a_description_and_a_help_page_that_has_them(host):
    for name in (name for name in host.nodes.NODE_CLASS_MAPPINGS if name.startswith("Personalize")):
        node = host.node(name)
        info = node.GET_NODE_INFO_V1()
        assert len(info["description"]) > 30
        assert info["category"] == "Personalize"
        groups = [info["input"].get(group, {}) for group in ("required", "optional")]
        for group in groups:
            for key, spec in group.items():
                assert len(spec[1].get("tooltip", "")) > 20, (name, key)
                for inner in spec[1].get("template", {}).get("input", {}).values():
                    assert all(len(one[1]["tooltip"]) > 20 for one in inner.values()), (name, key)
        assert all(info["output_tooltips"] or [])
        page = (DOCS / f"{name}.md").read_text()
        assert page == page_of(info, page), "run tests/host/help_pages.py"
        assert (DOCS / f"{name}.jpg").stat().st_size > 5_000


def test_a_graph_gives_the_same_picture_every_time(host, models, photos):
    plain = graph()
    plain["9"]["inputs"]["model"] = ["1", 0]
    before = picture(host, host.run(plain))
    first = picture(host, host.run(graph()))
    for seed in (2, 1, 3, 1, 4, 1):  # the sampler runs again while its inputs stay cached
        prompt = graph()
        prompt["9"]["inputs"]["seed"] = seed
        again = picture(host, host.run(prompt))
        assert (again == first) is (seed == 1)
    plain["9"]["inputs"]["seed"] = 5
    host.run(plain)
    plain["9"]["inputs"]["seed"] = 1
    assert picture(host, host.run(plain)) == before, "a patch was left on the loaded model"
    assert first != before
    assert picture(host, host.run(graph(weight=0.0))) == before


def test_a_folder_is_encoded_again_when_it_changes(host, models, photos):
    first = picture(host, host.run(graph()))
    Image.effect_noise((90, 90), 30).convert("RGB").save(photos / "9.png")
    assert picture(host, host.run(graph())) != first


def test_pictures_of_any_sizes_and_batches(host, encode):
    outputs = encode(
        images={
            "image0": torch.rand(1, 50, 80, 3),
            "image1": torch.rand(3, 64, 64, 3),
            "image10": torch.rand(1, 90, 40, 4),
        },
        masks={"mask0": torch.rand(1, 50, 80)},
        weights="1 2 3 4 5",
    )
    references, seen = outputs[0], outputs[1]
    assert references.names == ("image0", "image1[0]", "image1[1]", "image1[2]", "image10")
    assert references.weights.tolist() == [1, 2, 3, 4, 5]
    assert references.pooled.shape == (5, 96)
    assert references.patches.shape == (5, 65, 128)
    assert seen.shape == (5, 64, 64, 3)


def test_grey_pictures_and_masks_of_other_shapes(encode):
    images = {"image0": torch.rand(1, 50, 50, 1), "image1": torch.rand(1, 50, 50, 3)}
    outputs = encode(images=images, masks={"mask0": torch.rand(50, 50), "mask1": torch.rand(1, 1, 50, 50)})
    assert outputs[1].shape == (2, 64, 64, 3)


def test_a_path_as_windows_copies_it(encode, photos):
    assert len(encode(folder=f' "{photos}" ')[0]) == 3


def test_photographs_are_read_one_at_a_time(host, encode, photos, monkeypatch):
    module, alive = host.module("nodes.references"), []
    read = module.read_picture

    def watched(path):
        assert sum(reference() is not None for reference in alive) <= 1
        picture = read(path)
        alive.append(weakref.ref(picture))
        return picture

    monkeypatch.setattr(module, "read_picture", watched)
    assert len(encode(folder="photos")[0]) == 3


def test_encoding_equals_the_hosts_own_node(host, encode, clip_vision):
    """No mask and crop: what CLIPVisionEncode gives."""
    image = torch.rand(1, 300, 200, 3)
    theirs = clip_vision.encode_image(image, crop=True)
    ours = encode(images={"image0": image})[0]
    torch.testing.assert_close(ours.pooled, theirs["image_embeds"].float())
    torch.testing.assert_close(ours.patches, theirs["penultimate_hidden_states"].float())


def test_encoding_equals_transformers(encode, root):
    file = root / "models" / "pocket" / "clip_vision" / "pocket_portraits_vision.safetensors"
    reference = load_image_encoder(file)
    references = encode(images={"image0": torch.rand(1, 64, 64, 3)})[0]
    with torch.no_grad():
        zero = reference(torch.zeros(1, 3, 64, 64), output_hidden_states=True).hidden_states[-2][0]
    # ComfyUI keeps the encoder in half precision on the CPU too
    assert float((references.zero_patches - zero).norm() / zero.norm()) < 1e-3


def test_pictures_are_encoded_once(host, encode, clip_vision, monkeypatch):
    calls = []
    model = clip_vision.encode_image
    monkeypatch.setattr(
        clip_vision, "encode_image", lambda image, *a, **k: calls.append(len(image)) or model(image, *a, **k)
    )
    batch = torch.rand(3, 40, 40, 3)
    first = encode(images={"image0": batch})[0]
    assert calls == [3]
    second = encode(images={"image0": batch.flip(0), "image1": torch.rand(1, 30, 30, 3)}, weights="1 1 1 2")[0]
    assert calls == [3, 1]
    assert torch.equal(second.patches[:3], first.patches.flip(0))
    encode(images={"image0": batch[:1].expand(20, -1, -1, -1)})
    assert calls == [3, 1]


def test_encoding_can_be_cancelled(host, encode):
    import comfy.model_management

    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        encode(images={"image0": torch.rand(1, 33, 33, 3)})


def test_real_photographs_in_one_call(host, encode, photographs):
    outputs = encode(folder=str(photographs / "mixed" / "dog"))
    assert outputs[0].names == ("grey.webp", "IMG_0001.JPG", "IMG_0002.jpeg", "portrait with alpha.png", "tiny été.png")
    folder = host.module("models.pictures")
    upright = folder.read_picture(photographs / "mixed" / "dog" / "IMG_0002.jpeg").pixels
    stored = Image.open(photographs / "mixed" / "dog" / "IMG_0002.jpeg")
    assert stored.getexif().get(0x0112, 1) in (5, 6, 7, 8), "the sideways one"
    assert upright.shape[:2] == (stored.width, stored.height)
    assert torch.isfinite(outputs[0].patches).all()


def test_an_example_folder_of_the_pack(encode):
    assert len(encode(folder="example_photos")[0]) == 5


def test_save_and_load(host, encode):
    references = encode(images={"image0": torch.rand(2, 40, 40, 3)}, weights="1 0.5")[0]
    save, load = host.node("PersonalizeSaveReferences").execute, host.node("PersonalizeLoadReferences").execute
    save(references, "pets/rex")
    save(references.with_weights([3, 3]), "pets/rex")
    folder = host.base / "output" / "references" / "pets"
    assert sorted(os.listdir(folder)) == ["rex.safetensors", "rex_02.safetensors"]
    listed = host.folder_paths.get_filename_list("references")
    assert os.path.join("pets", "rex.safetensors") in listed
    loaded = load(os.path.join("pets", "rex.safetensors"), "")[0]
    assert torch.equal(loaded.patches, references.patches)
    assert loaded.weights.tolist() == [1, 0.5]
    assert load(os.path.join("pets", "rex.safetensors"), "0, 1")[0].weights.tolist() == [0, 1]
    for name in ("../outside", "", "/abs", "pets/", ".", "..", "a\0b", "C:/x"):
        with pytest.raises(ValueError, match="is not a file name inside"):
            save(references, name)
    with pytest.raises(ValueError, match="cannot be written"):
        save(references, "x" * 300)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({}, "There are no reference pictures"),
        ({"images": {"image0": None}}, "There are no reference pictures"),
        ({"images": {"image0": torch.rand(1, 1, 1, 3)}}, "image0 is 1x1 pixels"),
        ({"images": {"image0": torch.full((1, 40, 40, 3), float("nan"))}}, "image0 has values that are not numbers"),
        (
            {"images": {"image0": torch.rand(1, 40, 60, 3)}, "masks": {"mask0": torch.rand(1, 40, 40)}},
            "mask of image0 is 40x40 but the picture is 60x40",
        ),
        (
            {"images": {"image0": torch.rand(3, 40, 40, 3)}, "masks": {"mask0": torch.rand(2, 40, 40)}},
            "mask0 has 2 masks but image0 has 3 pictures",
        ),
        (
            {"images": {"image0": torch.rand(1, 40, 40, 3)}, "masks": {"mask1": torch.rand(1, 40, 40)}},
            "mask1 has no picture",
        ),
        ({"images": {"image0": torch.rand(1, 40, 40, 3)}, "weights": "1 2"}, "2 weights for 1 reference "),
        ({"folder": "nowhere"}, 'There is no folder "nowhere"'),
        ({"folder": "x" * 5000}, 'There is no folder "x'),
        ({"folder": __file__}, "is a file: write the folder it is in"),
        ({"images": {"image0": torch.rand(40, 40, 3)}}, r"image0 has the shape \(40, 40, 3\)"),
        ({"images": {"image0": torch.rand(1, 40, 40, 2)}}, r"image0 has the shape \(1, 40, 40, 2\)"),
    ],
)
def test_bad_references(encode, inputs, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        encode(**inputs)
    assert "\n" not in str(error.value)


def test_bad_folders(host, encode, photos):
    (photos / "broken.jpeg").write_bytes(b"\xff\xd8\xff not a picture")
    with pytest.raises(ValueError, match=r"broken\.jpeg in .*photos cannot be read"):
        encode(folder="photos")
    empty = host.base / "input" / "empty"
    empty.mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="empty has no pictures"):
        encode(folder="empty")


def test_an_unknown_image_encoder(host):
    with pytest.raises(ValueError, match="ComfyUI did not recognise its file"):
        host.node("PersonalizeEncodeReferences").execute(None, images={"image0": torch.rand(1, 40, 40, 3)})


def test_errors_reach_the_user_as_one_sentence(host, models, photos):
    (photos / "broken.jpeg").write_bytes(b"x")
    with pytest.raises(HostError, match=r"^broken\.jpeg in .* cannot be read as a picture \([^\n]*\)\.$"):
        host.run(graph())


def test_a_lora_in_models_ipadapter(host, models):
    path = models / "ipadapter" / "lora.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"lora\.safetensors in .* is a LoRA.*models/loras"):
        host.node("PersonalizeLoadIPAdapter").execute("lora.safetensors")
    path.unlink()


def test_a_file_that_is_gone(host, models):
    with pytest.raises(ValueError, match=r"gone\.bin is not in .*ipadapter"):
        host.node("PersonalizeLoadIPAdapter").execute("gone.bin")


@pytest.mark.parametrize(
    ("layout", "adapter", "words"),
    [
        (narrow.SD15, "ip-adapter-plus_sdxl_vit-h", ("made for SDXL (70", "model is SD1.5 (16")),
        (narrow.SDXL, "ip-adapter-plus_sd15", ("made for SD1.5 (16", "model is SDXL (70")),
    ],
    ids=["SDXL on SD1.5", "SD1.5 on SDXL"],
)
def test_an_adapter_for_another_base_model(host, layout, adapter, words):
    state = {part: view_tensors(shapes) for part, shapes in adapter_shapes(*PUBLISHED[adapter]).items()}
    model = narrow.comfy_model(layout, narrow.diffusers_unet(layout))
    references = narrow.references(host.module("models.references"), 1)
    with pytest.raises(ValueError, match="This adapter is made for") as error:
        host.node("PersonalizeApplyIPAdapter").execute(model, state, references, 1.0)
    assert all(word in str(error.value) for word in words)


def test_a_wrong_encoder(host, encode, photos):
    model, adapter = (
        narrow.comfy_model(narrow.SD15, narrow.diffusers_unet(narrow.SD15)),
        narrow.adapter(narrow.SD15, "plus"),
    )
    references = encode(folder="photos")[0]
    words = r"takes image features of width 1280.*the pocket model's.*have width 128: encode them with CLIP ViT-H"
    with pytest.raises(ValueError, match=words):
        host.node("PersonalizeApplyIPAdapter").execute(model, adapter, references, 1.0)


def test_a_model_that_is_no_unet(host, models, photos):
    class Flux:
        model = type("Flux", (), {})()

        def get_model_object(self, name):
            return torch.nn.Linear(1, 1)

    references = narrow.references(host.module("models.references"), 1)
    with pytest.raises(ValueError, match=r"needs an SD1\.5, SD2 or SDXL model, but this MODEL is Flux"):
        host.node("PersonalizeApplyIPAdapter").execute(Flux(), narrow.adapter(narrow.SD15, "plus"), references, 1.0)


def mask_graph(width, height, masks=1, batch=1):
    prompt = graph()
    prompt["20"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": width, "height": height}}
    prompt["5"]["inputs"]["mask"] = ["20", 0]
    prompt["8"]["inputs"]["batch_size"] = batch
    return prompt


def test_a_mask_of_another_aspect(host, models, photos):
    host.run(mask_graph(1000, 1000))  # another size of the same aspect is scaled
    with pytest.raises(HostError, match="mask of Apply IP-Adapter is 200x100 but the picture is 128x128"):
        host.run(mask_graph(200, 100))


def test_a_number_of_masks_that_fits_no_batch(host):
    model = narrow.comfy_model(narrow.SD15, narrow.diffusers_unet(narrow.SD15))
    references = narrow.references(host.module("models.references"), 1)
    patched = host.node("PersonalizeApplyIPAdapter").execute(
        model, narrow.adapter(narrow.SD15, "plus"), references, 1.0, mask=torch.ones(3, 64, 64)
    )[0]
    positive, negative = narrow.conditionings(narrow.SD15)
    with pytest.raises(ValueError, match="3 masks for a batch of 2 pictures"):
        narrow.evaluate(patched, positive, negative, torch.zeros(2, 4, 16, 16), 500)


def test_folders_are_added_never_replaced(host):
    folders = host.module("nodes.folders")
    registry = host.folder_paths.folder_names_and_paths
    before = registry["ipadapter"]
    try:
        registry["ipadapter"] = (["/from/extra_model_paths"], set())  # as extra_model_paths.yaml leaves it
        folders.register_folders()
        paths, extensions = registry["ipadapter"]
        assert paths[0] == "/from/extra_model_paths"
        assert str(host.base / "models" / "ipadapter") in paths
        assert {".safetensors", ".bin"} <= extensions
    finally:
        registry["ipadapter"] = before
