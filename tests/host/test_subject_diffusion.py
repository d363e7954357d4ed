"""Subject-Diffusion in ComfyUI: as headless, what it gives the host, and what it says when something is wrong."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import EulerDiscreteScheduler
from finetuning import CHECKPOINT
from identity_sets import ENCODER
from inprocess import node, patched
from pack.models.errors import PersonalizeError
from pack.models.metadata import read_about
from pack.models.pictures import CLIP_MEAN, CLIP_STD
from pack.models.subject_diffusion import BOXES as BOXES_PART
from pack.models.subject_diffusion import CLS, WORDS, ChangedRows, read_subject_diffusion
from pack.models.weight_files import read_safetensors, write_safetensors
from pack.training.base_model import load_base
from pack.training.generate import Sampling
from pack.training.image_encoder import load_image_encoder
from pack.training.subject_data import read_subjects
from pack.training.subject_drawing import Placed, SubjectArtist, SubjectJob
from pack.training.subject_features import look_of
from PIL import Image
from sampling import encode, pixels
from subject_sets import train_subjects

NAME = "subjects.safetensors"
PROMPT = "a smiling cat and a sad woman, on a blue background"
BOXES = ((0.1, 0.2, 0.45, 1.0), (0.55, 0.2, 0.9, 1.0))


@pytest.fixture(scope="module")
def file(host, root, subject_set, tmp_path_factory):
    """Trained for a step, with its gates and its location opened wide."""
    (path,) = train_subjects(root, subject_set, tmp_path_factory.mktemp("training"), max_train_steps=1)
    tensors, about = read_safetensors(path)
    for i, (name, value) in enumerate(tensors.items()):
        if name.endswith(("alpha_attn", "alpha_dense")):
            tensors[name] = torch.full_like(value, 0.2)
        noise = (
            torch.randn(value.shape, generator=torch.Generator().manual_seed(i)) if value.is_floating_point() else None
        )
        if "null" in name:
            tensors[name] = noise.to(value)
        if name == "parts.conv_in.weight":
            tensors[name] = torch.cat([value[:, :-1], 0.1 * noise[:, -1:].to(value)], 1)
    where = host.base / "models" / "subject_diffusion" / NAME
    where.parent.mkdir(exist_ok=True)
    write_safetensors(where, tensors, about)
    return where


@pytest.fixture(scope="module")
def crops(subject_set):
    found = [one for picture in read_subjects(subject_set) for one in picture.subjects]
    return [found[0].crop, found[1].crop]


def subjects(host, crops, words=("cat", "woman"), boxes=BOXES):
    listed = ()
    for crop, word, (left, top, right, bottom) in zip(crops, words, boxes, strict=True):
        picture = torch.from_numpy(np.asarray(Image.open(crop), np.float32) / 255)
        (listed,) = node(host, "Subject")(
            word, left, top, right - left, bottom - top, picture[None, ..., :3], "", picture[None, ..., 3], None, listed
        )
    return listed


def applied(host, loaded, clip_vision, listed, prompt=PROMPT, name=NAME):
    file = node(host, "LoadSubjectDiffusion")(name)[0]
    return node(host, "ApplySubjectDiffusion")(loaded[0], loaded[1], clip_vision, file, listed, prompt)


def drawn(host, model, positive, negative, only, noise, scales=(4.0, 1.5), guide=None):
    guider = guide or node(host, "SubjectGuider")(model, positive, negative, only, *scales)[0]
    import comfy.samplers

    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "ddim_uniform", 20)
    sampler = comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=0)


def headless(root, file, crops, path):
    """A picture by the trainer's artist, its values 0 to 1, and the noise that gives the host the same start."""
    base = load_base(str(root / CHECKPOINT))
    scheduler = EulerDiscreteScheduler.from_config(base.pipeline.scheduler.config)
    scheduler.set_timesteps(20)
    artist = SubjectArtist(base, file, load_image_encoder(root / ENCODER))
    placed = tuple(Placed(*one) for one in zip(crops, ("cat", "woman"), BOXES, strict=False))
    job = SubjectJob(path, PROMPT, 3, placed)
    artist.draw(Accelerator(), [job], Sampling(64, 20, 4.0, width=96), "Drawing")
    noise = torch.randn(1, 32, 8, 12, generator=torch.Generator().manual_seed(3))
    return np.asarray(Image.open(path)).astype(np.float32) / 255, noise * scheduler.init_noise_sigma


def start(loaded, noise):
    """As the host wants it."""
    return noise / loaded[0].get_model_object("model_sampling").sigma(torch.tensor(951.0))


def test_in_comfyui_as_headless(host, root, loaded, clip_vision, file, crops, tmp_path):
    model, positive, negative, only = applied(host, loaded, clip_vision, subjects(host, crops))
    ours, noise = headless(root, file, crops, tmp_path / "picture.png")
    given = start(loaded, noise)
    latent = drawn(host, model, positive, negative, only, given)
    theirs = pixels(loaded, latent).numpy()[0]
    assert np.abs(ours - theirs).max() * 255 <= 2
    plain = encode(host, loaded[1], PROMPT)
    plain = pixels(loaded, drawn(host, model, plain, negative, negative, given)).numpy()[0]
    assert np.abs(plain - theirs).max() * 255 > 20
    moved = subjects(host, crops, boxes=((0.0, 0.0, 0.2, 0.5), (0.7, 0.0, 1.0, 0.4)))
    other = applied(host, loaded, clip_vision, moved)
    elsewhere = pixels(loaded, drawn(host, *other, given)).numpy()[0]
    assert np.abs(elsewhere - theirs).max() * 255 > 20
    assert not loaded[0].patches, "the host's model is as it was"


def test_one_subject_of_a_file_without_parts_as_headless(host, root, loaded, clip_vision, file, crops, tmp_path):
    """What it was trained without is not told, and a missing subject is what was learned for it."""
    tensors, metadata = read_safetensors(file)
    about, seen = read_about(metadata, NAME), []
    for name, without in (("whole", []), ("bare", [BOXES_PART, CLS])):
        other = file.with_name(f"{name}.safetensors")
        told = replace(about, settings={**about.settings, "without": without})
        write_safetensors(other, tensors, told.as_metadata())
        one = subjects(host, crops[:1], ("cat",), BOXES[:1])
        model, positive, negative, only = applied(host, loaded, clip_vision, one, name=other.name)
        ours, noise = headless(root, other, crops[:1], tmp_path / f"{name}.png")
        theirs = pixels(loaded, drawn(host, model, positive, negative, only, start(loaded, noise))).numpy()[0]
        assert np.abs(ours - theirs).max() * 255 <= 2
        seen.append(theirs)
    assert np.abs(seen[0] - seen[1]).max() * 255 > 10


def test_the_encoder_sees_what_it_sees_in_training(host, crops):
    """With the crop's alpha channel as the mask, and with the mask of the picture that the crop is of."""
    rng, module = np.random.default_rng(0), sys.modules[host.node("PersonalizeApplySubjectDiffusion").__module__]
    for one, crop in zip(subjects(host, crops), crops, strict=True):
        expected = look_of(crop, 0, None, rng, 48).movedim(0, 2) * torch.tensor(CLIP_STD) + torch.tensor(CLIP_MEAN)
        torch.testing.assert_close(module.look_of(one, 48), expected, rtol=0, atol=1e-6)
        wide = torch.nn.functional.pad(one.image, (0, 0, 3, 40, 5, 0), value=0.3)
        mask = torch.nn.functional.pad(one.mask, (3, 40, 5, 0))
        other = module.look_of(replace(one, image=wide, mask=mask), 48)
        torch.testing.assert_close(other, module.look_of(one, 48), rtol=0, atol=1e-6)


def test_what_is_patched(host, loaded, clip_vision, file, crops):
    model = applied(host, loaded, clip_vision, subjects(host, crops))[0]
    tensors, _ = read_safetensors(file)
    trained = [name for name in tensors if name.startswith("unet.")]
    assert len(model.patches) == len(trained) + 2
    key = "diffusion_model.input_blocks.0.0.weight"
    torch.testing.assert_close(
        patched(model, key), tensors["parts.conv_in.weight"][:, :-1].float(), rtol=1e-2, atol=1e-3
    )


def test_words_of_the_file_in_the_clip_s_table(host, loaded, file):
    """Those of the file, the others as they were loaded, even while another file's are in the CLIP."""
    module = sys.modules[host.node("PersonalizeApplySubjectDiffusion").__module__]
    import comfy.model_management

    tensors = read_subject_diffusion(file)
    model, clip = loaded[:2]
    key = next(key for key in clip.patcher.model.state_dict() if key.endswith(WORDS))
    base = patched(clip.patcher, key)
    strange = replace(tensors, words=ChangedRows(torch.tensor([3, 5]), torch.full((2, base.shape[1]), 7.0)))
    used = module.with_weights(model, clip, strange, NAME)[1]
    comfy.model_management.load_models_gpu([used.patcher], force_patch_weights=True)
    expected = base.clone()
    expected[tensors.words.index] = tensors.words.weight.to(base)
    found = patched(module.with_weights(model, clip, tensors, NAME)[1].patcher, key)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not torch.equal(expected, base)


def test_three_scales_that_are_one(host, loaded, clip_vision, file, crops):
    """s_i = s_t = 1 is the positive conditioning alone."""
    model, positive, negative, only = applied(host, loaded, clip_vision, subjects(host, crops))
    noise = torch.randn(1, 32, 8, 12, generator=torch.Generator().manual_seed(3))
    import comfy.samplers

    plain = comfy.samplers.CFGGuider(model)
    plain.set_conds(positive, negative)
    plain.set_cfg(1.0)
    one = drawn(host, model, positive, negative, only, noise, guide=plain)
    other = drawn(host, model, positive, negative, only, noise, (1.0, 1.0))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_what_is_wrong_is_told(host, loaded, clip_vision, file, crops):
    with pytest.raises(
        ValueError, match=r'^The word "horse" of a subject is not in the prompt; its words are: a, smiling'
    ):
        applied(host, loaded, clip_vision, subjects(host, crops, words=("horse", "woman")))
    with pytest.raises(ValueError, match=r'^The word "sad wo" of a subject is not in the prompt'):
        applied(host, loaded, clip_vision, subjects(host, crops, words=("Cat", "sad wo")))
    three = subjects(host, [*crops, crops[0]], ("cat", "woman", "cat"), (*BOXES, BOXES[0]))
    with pytest.raises(ValueError, match=r"knows 2 subjects in a picture, but there are 3"):
        applied(host, loaded, clip_vision, three)
    for word in ("a sks cat", "a (SKS:1.2) cat", "a cat sks's", "a sks-like cat"):
        with pytest.raises(ValueError, match=r'^The prompt has "sks" in it'):
            applied(host, loaded, clip_vision, subjects(host, crops), f"{word} and a woman")
    with pytest.raises(ValueError, match=r"^There are no subjects: give at least one\.$"):
        applied(host, loaded, clip_vision, ())
    make, picture = node(host, "Subject"), torch.rand(1, 20, 30, 3)
    cases = {
        r"^The subject has no word": (" ", 0, 0, 1, 1, picture),
        r'^The box of "cat" is empty': ("cat", 0.2, 0.2, 0, 0.5, picture),
        r'^The box of "cat" reaches out of the picture \(left 0\.7, top 0, right 1\.2, bottom 0\.5\)': (
            *("cat", 0.7, 0, 0.5, 0.5),
            picture,
        ),
        r'^The box of "cat" reaches out of the picture \(left -0\.5, ': ("cat", -0.5, 0, 0.3, 0.5, picture),
        r'^The box of "cat" reaches out of the picture \(left 0, top -1, ': ("cat", 0, -1, 0.5, 1.5, picture),
        r'^The mask of "cat" is empty': ("cat", 0, 0, 1, 1, picture, "", torch.zeros(1, 20, 30)),
        r'^The mask of "cat" is 5 x 4, its picture 30 x 20': ("cat", 0, 0, 1, 1, picture, "", torch.ones(1, 4, 5)),
        r"^The place is an empty mask": ("cat", 0, 0, 1, 1, picture, "", None, torch.zeros(1, 8, 8)),
        r'^The subject "cat" has no picture: connect one, or write its file\.$': ("cat", 0, 0, 1, 1),
        r'^The subject "cat" has two pictures: a connected one and its file\.$': ("cat", 0, 0, 1, 1, picture, "a.png"),
        r'^There is no picture "a\.png" \(looked for .* and .*\): write': ("cat", 0, 0, 1, 1, None, "a.png"),
    }
    for sentence, given in cases.items():
        with pytest.raises(ValueError, match=sentence):
            make(*given)
    place = torch.zeros(1, 8, 10)
    place[:, 2:6, 5:10] = 1
    assert make("cat", 0, 0, 1, 1, picture, "", None, place)[0][0].box == (0.5, 0.25, 1.0, 0.75)


def test_what_is_wired_wrongly_is_told(host, loaded, clip_vision, file, crops):
    listed = subjects(host, crops)
    model, positive, negative, only = applied(host, loaded, clip_vision, listed)
    with pytest.raises(
        ValueError, match=r"^The model comes from another Apply Subject-Diffusion: connect the plain one"
    ):
        applied(host, (model, *loaded[1:]), clip_vision, listed)
    with pytest.raises(
        ValueError,
        match=r"^The model does not come from Apply Subject-Diffusion: connect its MODEL, positive, negative and subjects only here\.$",
    ):
        node(host, "SubjectGuider")(loaded[0], positive, negative, only, 4.0, 1.5)
    with pytest.raises(
        ValueError, match=r"connect that node's positive to conditioning, too, which brings the subjects"
    ):
        node(host, "AttendAndExcite")(model, loaded[1], PROMPT, "cat", 4, "")


def test_what_is_wrong_is_told_headless(root, file, crops, tmp_path):
    artist = SubjectArtist(load_base(str(root / CHECKPOINT)), file, load_image_encoder(root / ENCODER))
    one = Placed(crops[0], "cat", BOXES[0])
    for sentence, prompt, placed in (
        ("There are no subjects", "a cat", ()),
        ("knows 2 subjects in a picture, but there are 3", "a cat", (one, one, one)),
        ('The word "cat" of a subject is not in the prompt', "a dog", (one,)),
        ('The box of "cat" reaches out of the picture', "a cat", (replace(one, box=(-0.5, 0.2, 0.5, 1.0)),)),
        ('The box of "cat" is empty', "a cat", (replace(one, box=(0.5, 0.2, 0.5, 1.0)),)),
    ):
        with pytest.raises(PersonalizeError, match=sentence):
            artist.draw(Accelerator(), [SubjectJob(tmp_path / "a.png", prompt, 3, placed)], Sampling(64, 2, 4.0), "x")
    assert not list(tmp_path.iterdir())


def test_a_connected_mask_goes_before_the_file_s(host, crops):
    size = Image.open(crops[0]).size[::-1]
    mask = torch.zeros(1, *size)
    mask[:, : size[0] // 2] = 1
    (one,) = node(host, "Subject")("cat", 0.1, 0.2, 0.4, 0.8, None, str(crops[0]), mask)[0]
    assert torch.equal(one.mask, mask[0])


def test_a_picture_by_its_file(host, crops):
    wired = subjects(host, crops)[0]
    left, top, right, bottom = wired.box
    (one,) = node(host, "Subject")("cat", left, top, right - left, bottom - top, None, str(crops[0]))[0]
    assert torch.equal(one.image, wired.image)
    assert torch.equal(one.mask, wired.mask)
    assert one.box == wired.box


def test_with_ip_adapter_before_and_after(host, loaded, models, clip_vision, file, crops):
    """References and subjects both act, in any order; at weight 0 the references do not."""
    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    references = node(host, "EncodeReferences")(clip_vision, {"image0": picture})[0]
    adapter, listed = node(host, "LoadIPAdapter")("base.safetensors")[0], subjects(host, crops)
    noise = start(loaded, torch.randn(1, 32, 8, 12, generator=torch.Generator().manual_seed(3)))

    def with_references(model, weight):
        return node(host, "ApplyIPAdapter")(model, adapter, references, weight)[0]

    def both(weight, before):
        base = (with_references(loaded[0], weight), *loaded[1:]) if before else loaded
        model, *conds = applied(host, base, clip_vision, listed)
        return drawn(host, model if before else with_references(model, weight), *conds, noise)

    alone = drawn(host, *applied(host, loaded, clip_vision, listed), noise)
    after = both(1.0, before=False)
    torch.testing.assert_close(both(1.0, before=True), after, rtol=0, atol=1e-5)
    assert (after - alone).abs().max() > 0.05
    assert torch.equal(both(0.0, before=False), alone)


def test_attend_and_excite_moves_its_latent(host, loaded, clip_vision, file, crops):
    model, positive, negative, only = applied(host, loaded, clip_vision, subjects(host, crops))
    noise = start(loaded, torch.randn(1, 32, 8, 12, generator=torch.Generator().manual_seed(3)))
    plain = drawn(host, model, positive, negative, only, noise)

    def excited(words, steps=4):
        made = node(host, "AttendAndExcite")(model, loaded[1], PROMPT, words, steps, "", conditioning=positive)
        return drawn(host, made[0], made[1], negative, only, noise)

    assert torch.equal(excited("cat, woman", steps=0), plain)
    moved = excited("cat, woman")
    assert moved.isfinite().all()
    assert (moved - plain).abs().max() > 0.01
    assert torch.equal(drawn(host, model, positive, negative, only, noise), plain), "nothing is left on the model"
