"""A real ComfyUI server, driven as a client does, with the workflows as they ship."""

import threading
from io import BytesIO

import numpy as np
import pytest
import torch
from pack.training.base_model import load_base
from pack.training.demo.find import ROOT
from pack.training.demo.server import WorkflowError
from pack.training.pocket.attributes import SUBJECT_VALUES
from pack.training.pocket.files import CHECKPOINT
from pack.training.pocket.measure import read
from pack.training.pocket.shipped import load_judge
from PIL import Image
from required import REQUIRED, NotShownError, check, saved_pictures, workflow_of
from torch.nn import functional
from workflow import to_prompt

WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
NODES = ["LoadImageEncoder", "LoadIPAdapter", "EncodeReferences", "SaveReferences", "LoadReferences", "ApplyIPAdapter"]
NODES += ["ShowReferenceAttention", "LoadLoRA", "LoadTextualInversion", "LoadDreamBooth", "LoadPersonalization"]
NODES += ["ComposePrompt", "ComposeConcepts", "AttendAndExcite", "RecordAttentionMaps", "ShowAttentionMaps"]
NODES += ["LoadCustomDiffusion", "MergeCustomDiffusion"]
NODES += ["TrainLoRA", "TrainTextualInversion", "TrainDreamBooth"]
NODES += ["LoadSubjectDiffusion", "Subject", "ApplySubjectDiffusion", "SubjectGuider"]
NODES += ["ScoreImages", "ContactSheet"]


def prompt_of(server, name):
    return to_prompt(workflow_of(name), server.get("/object_info"))


def test_the_pack_is_imported_quietly(server):
    log = server.log()
    assert "IMPORT FAILED" not in log
    assert not [line for line in log.splitlines() if "Personalize" in line and ("WARN" in line or "Error" in line)]


def test_all_nodes_appear_with_tooltips(server):
    info = server.get("/object_info")
    ours = {name for name in info if name.startswith("Personalize")}
    assert ours == {f"Personalize{name}" for name in NODES}
    for name in ours:
        assert info[name]["description"]
        assert info[name]["category"] == "Personalize"
        for group in ("required", "optional"):
            for spec in info[name]["input"].get(group, {}).values():
                assert spec[1]["tooltip"]
        page = server.get(f"/extensions/Personalize/docs/{name}.md")
        assert page.startswith(b"# ")


def test_the_templates_are_listed_with_thumbnails(server):
    assert sorted(server.get("/api/workflow_templates")["Personalize"]) == WORKFLOWS
    for name in WORKFLOWS:
        assert server.get(f"/api/workflow_templates/Personalize/{name}.json")["nodes"]
        thumbnail = Image.open(BytesIO(server.get(f"/api/workflow_templates/Personalize/{name}.jpg")))
        assert thumbnail.width >= 400


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_shipped_workflow_ends_with_what_its_prompt_and_its_files_ask_for(server, name):
    before = len(server.log())
    saved = saved_pictures(server, prompt_of(server, name))
    assert len(saved) == {
        "compare_methods": 4,
        "attention_maps": 2,
        "composable_diffusion": 2,
        "attend_and_excite": 2,
    }.get(name, 1)
    pictures = [files[0] for files in saved.values()]
    picture = pictures[0]
    assert picture.format == "PNG"
    three = (4 * (3 * 64 + 2 * 8), 256)
    sizes = {"aggregations": three, "self_attention": three, "masks": (576, 384), "one_reference": (512, 512)}
    sizes |= {"saved_references": (512, 512)}
    sizes |= {"attention_maps": (384, 256), "composable": (192, 192), "merged": (384, 256)}
    sizes |= {"subject_diffusion": (384, 256), "measure": (918, 872)}
    assert picture.size == next((size for word, size in sizes.items() if word in name), (256, 256))
    assert np.asarray(picture).std() > 20
    assert len({other.tobytes() for other in pictures}) == len(pictures), "the methods give different pictures"
    if picture.size == three:
        thirds = [picture.crop((i * 288, 0, i * 288 + 256, 256)).tobytes() for i in range(3)]
        assert len(set(thirds)) == 3, "the aggregations give different pictures"
    log = server.log()[before:]
    assert "Traceback" not in log
    assert "ERROR" not in log
    if name != "measure_methods":  # whose picture is a sheet
        check(saved, REQUIRED[name])


@pytest.mark.parametrize("name", sorted({*REQUIRED} - {"train_lora"}))
def test_pictures_of_one_step_are_refused(server, name):
    """Each of them, and as blurred: what is on them may be right. What trains is left out, for it takes long."""
    prompt = prompt_of(server, name)
    for node in prompt.values():
        if node["class_type"] in ("KSampler", "BasicScheduler"):
            node["inputs"]["steps"] = 1
    with pytest.raises(NotShownError) as refused:
        check(saved_pictures(server, prompt), REQUIRED[name])
    assert {(one, "blur") for one in REQUIRED[name]} <= set(refused.value.args[0])


OFF = {
    "attend_and_excite": {"steps": 0, "thresholds": ""},
    "composable_diffusion": {"text": "a blue beanie and an orange cat"},
    "train_lora": {"steps": 1, "learning_rate": 1e-9},
}
"""Inputs of our nodes with which a method does nothing; those of the other templates have a strength to be 0."""
STRENGTHS = {"strength", "strength_model", "strength_clip", "weight", "subject_cfg"}
ALIKE = {"attention_maps", "text_to_image", "compare_methods", "subject_diffusion_two", "ip_adapter_two_masks"}
"""Have no method, or what another test takes away."""


@pytest.mark.parametrize("name", sorted({*REQUIRED} - ALIKE))
def test_pictures_without_the_method_are_refused(server, name):
    """They are good pictures, but not of the subject. Two instead of four, to be quick."""
    prompt = prompt_of(server, name)
    for node in prompt.values():
        own = OFF.get(name, dict.fromkeys(STRENGTHS, 0)) if node["class_type"].startswith("Personalize") else {}
        own = own | {"batch_size": 2} if node["inputs"].get("batch_size") == 4 else own
        node["inputs"] |= {
            key: value for key, value in own.items() if isinstance(node["inputs"].get(key), int | float | str)
        }
    with pytest.raises(NotShownError) as refused:
        check(saved_pictures(server, prompt), REQUIRED[name])
    assert not {what for _, what in refused.value.args[0]} & {"alike", "blur"}


@pytest.mark.parametrize("which", [0, 1])
def test_pictures_without_one_of_two_references_are_refused(server, which):
    prompt = prompt_of(server, "ip_adapter_two_masks")
    applied = [node for node, inner in prompt.items() if inner["class_type"] == "PersonalizeApplyIPAdapter"]
    prompt[applied[which]]["inputs"]["weight"] = 0
    with pytest.raises(NotShownError) as refused:
        check(saved_pictures(server, prompt), REQUIRED["ip_adapter_two_masks"])
    assert {what[0] for _, what in refused.value.args[0]} == {str(which)}, "the other is as it was"


@pytest.mark.parametrize("noise", ["white", "coloured", "decoded"])
@pytest.mark.parametrize("name", REQUIRED)
def test_noise_is_refused(noises, noise, name):
    """Even where the judge takes it for the subject."""
    for one in REQUIRED[name].values():
        width = one.beside * 64 + (one.beside - 1) * 8 if len(one.windows) == 1 else 96
        with pytest.raises(NotShownError) as refused:
            check({"noise": noises(noise, width)}, {"noise": one})
        assert {what for _, what in refused.value.args[0]} & {"alike", "blur"}


@pytest.fixture(scope="module")
def noises():
    """Four pictures of noise, 64 pixels high and of some width."""
    vae = load_base(str(ROOT / "models" / "pocket" / CHECKPOINT)).pipeline.vae

    @torch.no_grad()
    def draw(kind, width):
        generator = torch.Generator().manual_seed(width)
        if kind == "decoded":
            latent = torch.randn(4, vae.config.latent_channels, 8, width // 8, generator=generator)
            pixels = vae.decode(latent / vae.config.scaling_factor).sample.clamp(-1, 1) / 2 + 0.5
        elif kind == "coloured":
            few = torch.rand(4, 3, 4, width // 16, generator=generator)
            pixels = functional.interpolate(few, (64, width), mode="bicubic").clamp(0, 1)
        else:
            pixels = torch.rand(4, 3, 64, width, generator=generator)
        return [Image.fromarray(one) for one in (pixels * 255).byte().permute(0, 2, 3, 1).numpy()]

    return draw


def test_trained_files_are_measured_as_more_alike(server):
    outputs = server.run(prompt := prompt_of(server, "measure_methods"))
    (sheet,) = (inner["inputs"] for inner in prompt.values() if inner["class_type"] == "PersonalizeContactSheet")
    of_row = {i: sheet[f"details.detail{i}"][0] for i in range(4)}
    said = {
        i: dict(line.rsplit(" ", 1) for line in outputs[node]["text"][0].splitlines()) for i, node in of_row.items()
    }
    without, word, lora, dreambooth = (float(said[i]["likeness"]) for i in range(4))
    assert max(without, word) + 0.2 < min(lora, dreambooth), said
    assert set(said[0]) == {"CLIP-I", "CLIP-T", "likeness"}


def test_two_subjects_stand_in_their_boxes(server):
    """Each with what its picture shows: and exchanged with their boxes."""
    wanted = {"woman": {"kind": "woman", "glasses": "sunglasses"}, "dog": {"kind": "dog", "fur": "orange"}}
    prompt = prompt_of(server, "subject_diffusion_two")
    (saved,) = (node for node, inner in prompt.items() if inner["class_type"] == "SaveImage")
    subjects = [inner["inputs"] for inner in prompt.values() if inner["class_type"] == "PersonalizeSubject"]
    for left, right in (("woman", "dog"), ("dog", "woman")):
        outputs = server.run(prompt)
        files = [server.picture(picture) for picture in outputs[saved]["images"]]
        pictures = [np.asarray(Image.open(BytesIO(file)).convert("RGB").resize((96, 64))) for file in files]
        for half, word in zip(read(load_judge(), np.stack(pictures)), (left, right), strict=True):
            for trait, own in wanted[word].items():
                share = np.mean([SUBJECT_VALUES[trait][value] == own for value in half[trait]])
                assert share >= 0.75, (word, trait, share)
        one, other = (dict(inner) for inner in subjects)
        for side in ("left", "top", "width", "height"):
            subjects[0][side], subjects[1][side] = other[side], one[side]


def test_real_photographs_by_folder(server, photographs):
    prompt = prompt_of(server, "ip_adapter_one_reference")
    encode = next(node for node in prompt.values() if node["class_type"] == "PersonalizeEncodeReferences")
    encode["inputs"] = {"clip_vision": encode["inputs"]["clip_vision"], "weights": "", "framing": "pad"}
    encode["inputs"]["folder"] = str(photographs / "mixed" / "dog")
    for node in prompt.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 1
    outputs = server.run(prompt)
    preview = next(node for node, inner in prompt.items() if inner["class_type"] == "PreviewImage")
    assert len(outputs[preview]["images"]) == 5


def test_what_a_user_did_wrong_arrives_as_one_sentence(server):
    prompt = prompt_of(server, "ip_adapter_one_reference")
    encode = next(node for node in prompt.values() if node["class_type"] == "PersonalizeEncodeReferences")
    encode["inputs"] = {"clip_vision": encode["inputs"]["clip_vision"], "folder": "", "weights": "", "framing": "crop"}
    with pytest.raises(WorkflowError, match=r"^PersonalizeEncodeReferences: There are no reference pictures[^\n]*$"):
        server.run(prompt)


def test_cancel(server):
    prompt = prompt_of(server, "ip_adapter_one_reference")
    for node in prompt.values():
        if node["class_type"] == "KSampler":
            node["inputs"] |= {"steps": 1000, "seed": 99}
    started = threading.Event()
    threading.Thread(target=lambda: started.wait(120) and server.post("/interrupt", {}), daemon=True).start()
    with pytest.raises(WorkflowError, match="cancelled"):
        server.run(prompt, lambda _node, value, total: started.set() if total == 1000 and value >= 2 else None)
