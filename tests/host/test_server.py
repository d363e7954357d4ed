"""A real ComfyUI server, driven as a client does, with the workflows as they ship."""

import json
import threading
from io import BytesIO

import numpy as np
import pytest
from pack.training.demo.find import ROOT
from pack.training.demo.server import Server, WorkflowError
from pack.training.pocket.attributes import SUBJECT_VALUES
from pack.training.pocket.data import identity
from pack.training.pocket.measure import VALUES, read
from pack.training.pocket.photos import SUBJECTS
from pack.training.pocket.shipped import load_judge
from PIL import Image
from workflow import to_prompt

WOMAN, DOG = {"kind": "woman"}, {"kind": "dog"}
SHOWN = {
    "attend_and_excite": (WOMAN, DOG),
    "attention_maps": (WOMAN, DOG),
    "composable_diffusion": ({"kind": "cat", "fur": "orange", "hat_colour": "blue"},),
    "custom_diffusion_merged": (WOMAN, DOG),
    "ip_adapter_compare_aggregations": ({"background": "library", "expression": "surprised"},),
    "ip_adapter_one_reference": ({"kind": "robot", "background": "beach"},),
    "ip_adapter_self_attention": ({"kind": "cat"},),
    "ip_adapter_two_masks": ({"kind": "robot"}, DOG),
    "subject_diffusion_one": ({}, WOMAN | {"background": "beach"}),
    "textual_inversion": ({"background": "beach"},),
    "subject_diffusion_two": (WOMAN, DOG),
}
"""What the judge must see, from left to right, in most of each template's pictures; in all others a woman."""
WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
NODES = ["LoadImageEncoder", "LoadIPAdapter", "EncodeReferences", "SaveReferences", "LoadReferences", "ApplyIPAdapter"]
NODES += ["ShowReferenceAttention", "LoadLoRA", "LoadTextualInversion", "LoadDreamBooth", "LoadPersonalization"]
NODES += ["ComposePrompt", "ComposeConcepts", "AttendAndExcite", "RecordAttentionMaps", "ShowAttentionMaps"]
NODES += ["LoadCustomDiffusion", "MergeCustomDiffusion"]
NODES += ["TrainLoRA", "TrainTextualInversion", "TrainDreamBooth"]
NODES += ["LoadSubjectDiffusion", "Subject", "ApplySubjectDiffusion", "SubjectGuider"]
NODES += ["ScoreImages", "ContactSheet"]


@pytest.fixture(scope="module")
def server(comfyui, tmp_path_factory):
    with Server(comfyui, tmp_path_factory.mktemp("comfyui")) as running:
        yield running


def prompt_of(server, name):
    workflow = json.loads((ROOT / "workflows" / f"{name}.json").read_text())
    return to_prompt(workflow, server.get("/object_info"))


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
def test_a_shipped_workflow_ends_with_a_picture(server, name):
    before = len(server.log())
    prompt = prompt_of(server, name)
    outputs = server.run(prompt)
    saved = [node for node, inner in prompt.items() if inner["class_type"] == "SaveImage"]
    assert len(saved) == {
        "compare_methods": 4,
        "attention_maps": 2,
        "composable_diffusion": 2,
        "attend_and_excite": 2,
    }.get(name, 1)
    pictures = [Image.open(BytesIO(server.picture(outputs[node]["images"][0]))) for node in saved]
    picture = pictures[0]
    assert picture.format == "PNG"
    three = (4 * (3 * 64 + 2 * 8), 256)
    sizes = {"aggregations": three, "self_attention": three, "masks": (576, 384), "one_reference": (512, 512)}
    sizes |= {"saved_references": (512, 512)}
    sizes |= {"attend": (384, 256), "attention_maps": (384, 256), "composable": (192, 192), "merged": (384, 256)}
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
        judged = saved[name in ("composable_diffusion", "attend_and_excite")]  # the first there is without it
        files = [Image.open(BytesIO(server.picture(image))) for image in outputs[judged]["images"]]
        check_what_is_shown(files, SHOWN.get(name, (WOMAN,)), three)


def check_what_is_shown(pictures, wanted, three):
    """By the judge; of three pictures side by side the first is looked at."""
    height, pixels = 64, []
    for picture in pictures:
        one = picture.convert("RGB").crop((0, 0, 256, 256)) if picture.size == three else picture.convert("RGB")
        pixels.append(np.asarray(one.resize((round(height * one.width / one.height), height))))
    for window, own in zip(read(load_judge(), np.stack(pixels)), wanted, strict=True):
        for attribute, value in own.items():
            seen = [VALUES[attribute][number] for number in window[attribute]]
            assert seen.count(value) > len(seen) / 2, (attribute, value, seen)


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


def test_the_shipped_files_know_their_subject(server):
    """Each of them makes pictures of the woman whom the base has never seen."""
    own = identity(SUBJECTS, 10)
    outputs = server.run(prompt := prompt_of(server, "compare_methods"))
    right = {}
    for node, inner in prompt.items():
        if inner["class_type"] == "SaveImage":
            files = [server.picture(picture) for picture in outputs[node]["images"]]
            pictures = [np.asarray(Image.open(BytesIO(file)).convert("RGB").resize((64, 64))) for file in files]
            seen = read(load_judge(), np.stack(pictures))[0]
            name = inner["inputs"]["filename_prefix"].partition("compare_")[2]
            right[name] = {
                trait: np.mean([SUBJECT_VALUES[trait][value] == getattr(own, trait) for value in seen[trait]])
                for trait in ("hair_colour", "hair_style")
            }
    assert set(right) == {"without", "textual_inversion", "lora", "dreambooth"}
    assert max(right["without"].values()) < 0.5, right
    assert right["textual_inversion"]["hair_colour"] > 0.7, right
    assert min(*right["lora"].values(), *right["dreambooth"].values()) > 0.7, right


def test_the_merged_concepts_stand_side_by_side(server):
    """A woman and a dog, each learned by itself, both with what is their own."""
    outputs = server.run(prompt := prompt_of(server, "custom_diffusion_merged"))
    (saved,) = (node for node, inner in prompt.items() if inner["class_type"] == "SaveImage")
    files = [server.picture(picture) for picture in outputs[saved]["images"]]
    pictures = [np.asarray(Image.open(BytesIO(file)).convert("RGB").resize((96, 64))) for file in files]
    halves = read(load_judge(), np.stack(pictures))
    for number, half, traits in ((10, halves[0], ("kind", "hair_style", "glasses")), (26, halves[1], ("kind", "fur"))):
        for trait in traits:
            own = getattr(identity(SUBJECTS, number), trait)
            assert np.mean([SUBJECT_VALUES[trait][value] == own for value in half[trait]]) >= 0.75, (trait, own)


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
