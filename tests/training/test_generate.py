"""Drawing for a measurement: the same pictures whatever the batch, whoever stopped it; files that others load."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import EulerDiscreteScheduler
from identity_sets import ADAPTER, CHECKPOINT, ENCODER, identities, train
from narrow_models import narrow_folder
from pack.models.attend_and_excite import Excitement
from pack.models.composable_diffusion import parse_concepts
from pack.models.ip_adapter import IPAdapter, read_ip_adapter
from pack.training import drawing, generate
from pack.training import evaluate as evaluation
from pack.training.base_model import load_base
from pack.training.encoding import read_text
from pack.training.generate import Job, ReferencePrompts, Sampling, draw_pictures
from pack.training.image_encoder import encode_references, load_image_encoder
from PIL import Image

SAMPLING = Sampling(64, steps=3, batch=2)
WORDS = ("a happy dog on a beach", "a sad cat", "a robot in space")


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return identities(tmp_path_factory.mktemp("people") / "people", 3, 3)


@pytest.fixture
def base(root):
    return load_base(str(root / CHECKPOINT))


def jobs(folder, people):
    sets = [tuple(sorted(one.glob("*.png"))) for one in sorted(people.iterdir())]
    return [
        Job(folder / f"{i}.png", words, 40 + i, references, {"pose": "left"})
        for i, (words, references) in enumerate(zip(WORDS, sets, strict=True))
    ]


def showing(base, root, aggregation="average", weight=1.0, file=None):
    adapter = IPAdapter.from_state(read_ip_adapter(file or root / ADAPTER))
    return ReferencePrompts(base, adapter, load_image_encoder(root / ENCODER), aggregation, "before projection", weight)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def spied(monkeypatch, module, name):
    """What a function of (vae, latent) is given, row by row."""
    seen, real = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda vae, row: seen.append(row.clone()) or real(vae, row))
    return seen


def by_hand(base, job, sampling, showing_them):
    """Composable Diffusion of one picture, a call of the UNet for each concept."""
    pipeline, unet = base.pipeline, base.pipeline.unet
    scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(sampling.steps)
    x = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(job.seed)) * scheduler.init_noise_sigma

    def predicted(text, shown):
        context = showing_them([job], (shown,)) if showing_them is not None else nullcontext()
        with context, torch.no_grad():
            return unet(scheduler.scale_model_input(x, t), t, encoder_hidden_states=read_text(base, [text]).states)[0]

    for t in scheduler.timesteps:
        negative = predicted("", False)
        pulls = [concept.weight * (predicted(concept.text, True) - negative) for concept in parse_concepts(job.prompt)]
        x = scheduler.step(negative + sampling.guidance * sum(pulls), t, x).prev_sample
    return x


def test_no_batch_and_no_stop_changes_a_picture(root, base, people, tmp_path):
    shown = showing(base, root, "concatenate")  # of different lengths in a batch, were they not all of three
    assert draw_pictures(Accelerator(), base, jobs(tmp_path / "a", people), SAMPLING, "a", shown) == 3
    assert draw_pictures(Accelerator(), base, jobs(tmp_path / "b", people)[1:], SAMPLING, "b", shown) == 2
    before = (tmp_path / "b" / "1.png").stat().st_mtime_ns
    assert draw_pictures(Accelerator(), base, jobs(tmp_path / "b", people), SAMPLING, "b", shown) == 1
    assert (tmp_path / "b" / "1.png").stat().st_mtime_ns == before
    for i, words in enumerate(WORDS):
        assert np.abs(pixels(tmp_path / "a" / f"{i}.png") - pixels(tmp_path / "b" / f"{i}.png")).max() <= 1
        assert (tmp_path / "a" / f"{i}.txt").read_text() == words + "\n"
        assert json.loads((tmp_path / "a" / f"{i}.json").read_text()) == {"pose": "left"}


def test_references_show_and_leave_no_trace(root, base, people, tmp_path):
    processors = dict(base.pipeline.unet.attn_processors)
    draw_pictures(Accelerator(), base, jobs(tmp_path / "with", people), SAMPLING, "", showing(base, root))
    assert base.pipeline.unet.attn_processors == processors
    draw_pictures(Accelerator(), base, jobs(tmp_path / "without", people), SAMPLING, "")
    draw_pictures(Accelerator(), base, jobs(tmp_path / "zero", people), SAMPLING, "", showing(base, root, weight=0.0))
    assert np.abs(pixels(tmp_path / "with" / "0.png") - pixels(tmp_path / "without" / "0.png")).max() > 20
    assert np.abs(pixels(tmp_path / "zero" / "0.png") - pixels(tmp_path / "without" / "0.png")).max() <= 1


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_a_file_with_pooling_draws_the_same_in_diffusers_own_ip_adapter(root, base, people, tmp_path, kind):
    fresh = {"ip_adapter": None, "adapter_kind": "plus", "learning_rate": 1e-2} if kind == "plus" else {}
    file = train(root, people, tmp_path / "out", aggregation="average", max_train_steps=2, **fresh)
    job = jobs(tmp_path / "ours", people)[0]
    draw_pictures(Accelerator(), base, [job], SAMPLING, "", showing(base, root, file=file, weight=0.8))
    pipeline = load_base(str(root / CHECKPOINT)).pipeline
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name, image_encoder_folder=None)
    pipeline.set_ip_adapter_scale(0.8)
    given = encode_references(load_image_encoder(root / ENCODER), job.references)
    shown, hidden = (given.patches, given.zero_patches[None]) if kind == "plus" else (given.pooled, 0 * given.pooled)
    theirs = pipeline(
        job.prompt,
        ip_adapter_image_embeds=[torch.stack([hidden.mean(0), shown.mean(0)])[:, None]],
        latents=torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(job.seed)),
        num_inference_steps=3,
        guidance_scale=4.0,
        output_type="np",
    ).images[0]
    assert np.abs(pixels(job.path) - theirs * 255).max() <= 2
    draw_pictures(Accelerator(), base, [replace(job, path=tmp_path / "bare.png")], SAMPLING, "")
    assert np.abs(pixels(tmp_path / "bare.png") - theirs * 255).max() > 20


@pytest.mark.parametrize("shown", [False, True])
def test_concepts_are_composed_in_one_call_as_the_formula_says(root, base, people, tmp_path, monkeypatch, shown):
    texts = ("a dog :0.8 AND a beach AND NOT rain :0.5", "a sad cat | a library")
    composing = [replace(job, prompt=text) for job, text in zip(jobs(tmp_path / "a", people), texts, strict=False)]
    showing_them, sampling = showing(base, root) if shown else None, replace(SAMPLING, prompts="composable_diffusion")
    unet, calls, kept = base.pipeline.unet, [], base.pipeline.unet.forward
    latents = spied(monkeypatch, generate, "decode")
    monkeypatch.setattr(unet, "forward", lambda *a, **k: calls.append(len(a[0])) or kept(*a, **k))
    draw_pictures(Accelerator(), base, composing, sampling, "", showing_them)
    assert calls == [2 * 4] * 3, "the negative prompt and three concepts of two pictures in each of three steps"
    monkeypatch.undo()
    for i, job in enumerate(composing):
        wanted = by_hand(base, job, sampling, showing_them)
        torch.testing.assert_close(latents[i], wanted, rtol=1e-4, atol=1e-4)


def test_a_single_concept_is_guidance_bit_for_bit(root, base, people, tmp_path):
    plain = jobs(tmp_path / "plain", people)
    single = [replace(job, path=tmp_path / "one" / job.path.name) for job in plain]
    draw_pictures(Accelerator(), base, plain, SAMPLING, "")
    draw_pictures(Accelerator(), base, single, replace(SAMPLING, prompts="composable_diffusion"), "")
    for one, other in zip(plain, single, strict=True):
        assert one.path.read_bytes() == other.path.read_bytes()


def test_words_are_excited_in_any_batch_and_leave_no_trace(root, base, people, tmp_path):
    sampling = replace(SAMPLING, prompts="attend_and_excite", excitement=Excitement(thresholds={0: 0.3}, refinements=2))
    words = ('dog, "a beach"', "", "robot space")

    def all_of(name):
        return [replace(job, excite=own) for job, own in zip(jobs(tmp_path / name, people), words, strict=True)]

    processors, shown = dict(base.pipeline.unet.attn_processors), showing(base, root)
    draw_pictures(Accelerator(), base, all_of("a"), sampling, "", shown)
    for job in all_of("b"):
        draw_pictures(Accelerator(), base, [job], sampling, "", shown)
    draw_pictures(Accelerator(), base, jobs(tmp_path / "plain", people), SAMPLING, "", shown)
    assert base.pipeline.unet.attn_processors == processors
    for i, own in enumerate(words):
        together, alone, plain = (pixels(tmp_path / name / f"{i}.png") for name in ("a", "b", "plain"))
        assert np.abs(together - alone).max() <= 2
        assert (np.abs(together - plain).max() > 10) == bool(own)


def test_sdxl_too(tmp_path):
    base = load_base(str(narrow_folder("sdxl", tmp_path / "narrow")))
    base.pipeline.unet.requires_grad_(False)
    sampling = Sampling(64, steps=2, batch=2)

    def drawn(name, **changes):
        some = [
            Job(tmp_path / name / f"{i}.png", text, 7 + i, excite="dog") for i, text in enumerate(("a dog", "one dog"))
        ]
        draw_pictures(Accelerator(), base, some, replace(sampling, **changes), "")
        return [job.path.read_bytes() for job in some]

    plain = drawn("plain")
    assert drawn("one", prompts="composable_diffusion") == plain
    excited = Excitement(scale=1000.0, thresholds={})
    moved = drawn("excited", prompts="attend_and_excite", excitement=excited)
    assert all(one != other for one, other in zip(moved, plain, strict=True))


def test_evaluate_draws_with_prompt_methods(root, people, tmp_path, capsys):
    common = [
        *("--pretrained_model_name_or_path", str(root / CHECKPOINT), "--real", str(people), "--bootstrap_draws", "0"),
        *("--output_dir", str(tmp_path / "measured"), "--pictures_per_prompt", "1", "--num_inference_steps", "2"),
    ]

    def run(*arguments):
        return evaluation.main([*common, *arguments]), capsys.readouterr().err

    exciting = ("--prompt_method", "attend_and_excite", "--prompt", "a {class} on a beach", "--prompt", "a sad {class}")
    status, said = run(*exciting, "--excite", "{class}", "--class_name", "dog", "--name", "excited")
    assert status == 0, said
    composing = ("--prompt_method", "composable_diffusion", "--prompt", "a dog AND NOT rain")
    status, said = run(*composing, "--name", "composed")
    assert status == 0, said
    assert len(list((tmp_path / "measured" / "drawn").rglob("*.png"))) == 3 * 3
    for arguments, sentence in (
        (exciting, "--excite is missing: the words that must show"),
        (
            (*exciting, *("--excite", "a") * 3),
            "--excite is given 3 times for 2 prompts: give it once, or once for each.",
        ),
        ((*exciting, "--excite", '"sad'), "A quote has no end"),
        (
            (*exciting, "--excite", "sad"),
            '"a person on a beach": "sad" is not in the prompt, whose words are: a, person, on',
        ),
        (
            (*composing, "--excite", "dog"),
            "--excite is for --prompt_method attend_and_excite, not composable_diffusion.",
        ),
        ((*composing, "--prompt", "a AND"), "has no text: write words on both sides"),
    ):
        status, said = run(*arguments, "--name", "refused")
        assert status == 1
        assert sentence in said
    assert not (tmp_path / "measured" / "drawn" / "refused").exists()


def test_evaluate_draws_first(root, people, tmp_path, capsys):
    file = train(root, people, tmp_path / "out", max_train_steps=1)
    arguments = [
        *("--pretrained_model_name_or_path", str(root / CHECKPOINT), "--ip_adapter", str(file)),
        *("--image_encoder", str(root / ENCODER), "--real", str(people), "--output_dir", str(tmp_path / "measured")),
        *("--prompt", "a {class} on a beach", "--prompt", "a sad {class}", "--class_name", "dog"),
        *("--pictures_per_prompt", "2", "--num_inference_steps", "2", "--bootstrap_draws", "20", "--name", "mine"),
    ]
    assert evaluation.main(arguments) == 0, capsys.readouterr().err
    drawn = sorted((tmp_path / "measured" / "drawn" / "mine").rglob("*.png"))
    assert len(drawn) == 3 * 2 * 2
    assert drawn[0].with_suffix(".txt").read_text() == "a dog on a beach\n"
    figures = json.loads((tmp_path / "measured" / "figures.json").read_text())["figures"]
    assert {"fid", "is", "likeness"} <= figures["mine"].keys()
    times = [path.stat().st_mtime_ns for path in drawn]
    assert evaluation.main(arguments) == 0
    assert [path.stat().st_mtime_ns for path in drawn] == times
    capsys.readouterr()
    assert evaluation.main([*arguments, "--weight", "0"]) == 1
    assert "mine were drawn with --weight 1.0 (now 0.0): use another --name." in capsys.readouterr().err


def test_what_cannot_be_drawn_is_told_at_once(root, people, tmp_path, capsys):
    arguments = [
        *("--pretrained_model_name_or_path", str(root / ENCODER), "--ip_adapter", str(root / CHECKPOINT)),
        *("--lora", str(tmp_path / "gone.safetensors"), "--real", str(tmp_path / "nobody")),
        *("--output_dir", str(tmp_path / "measured"), "--name", "a/b"),
    ]
    assert evaluation.main(arguments) == 1
    told = capsys.readouterr().err
    for sentence in (
        "is not a checkpoint",
        "--prompt is missing: what to draw.",
        "--image_encoder is missing",
        "is a checkpoint, not an IP-Adapter: its place is models/checkpoints, for its own loader.",
        "gone.safetensors does not exist",
        "'a/b' is no name for a folder",
        "nobody does not exist",
    ):
        assert sentence in told
    assert "--generated is missing" not in told
    for name in (".", "..", " ", "a\\b"):
        assert evaluation.main([*arguments, "--name", name]) == 1
        assert f"--name {name!r} is no name for a folder." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--weight", "0.5", "--references", "people"],
            "--references and --weight would do nothing without --ip_adapter",
        ),
        (["--word", "sks"], "--word would do nothing: write {trigger}, for which it stands, into a --prompt."),
        (
            ["--word", "sks", "--custom_diffusion", "CONCEPT"],
            "--word would do nothing: write {trigger}, for which it stands, into a --prompt.",
        ),
        (
            ["--class_name", "dog"],
            "--class_name would do nothing: write {class}, for which it stands, into a --prompt.",
        ),
        (["--textual_inversion", "WORD"], "--textual_inversion would do nothing: write {trigger} into a --prompt."),
        (
            ["--trigger", "sks"],
            "--trigger would do nothing without --clip, which reads the prompts: give both or neither.",
        ),
        (
            ["--ip_adapter", "ADAPTER", "--image_encoder", "ENCODER"],
            "pocket_portraits_ip_adapter.safetensors has no self-attention over the references: use --aggregation conc",
        ),
        (
            [
                "--ip_adapter",
                "ADAPTER",
                "--image_encoder",
                "ENCODER",
                "--aggregation",
                "max",
                "--references",
                "/nowhere",
            ],
            "The folder /nowhere does not exist.",
        ),
        (["--weight", "nan"], "weight is nan, but must be a finite number."),
    ],
)
def test_what_would_be_drawn_without_is_told(root, people, tmp_path, capsys, monkeypatch, options, sentence):
    monkeypatch.setattr(drawing, "load_base", None)
    places = {"ADAPTER": str(root / ADAPTER), "ENCODER": str(root / ENCODER), "people": str(people)}
    places |= {"WORD": str(tmp_path / "word.bin"), "CONCEPT": str(tmp_path / "concept.bin")}
    torch.save({"<word>": torch.zeros(64)}, places["WORD"])
    torch.save({"unet": {}}, places["CONCEPT"])
    common = ["--pretrained_model_name_or_path", str(root / CHECKPOINT), "--prompt", "a dog", "--real", str(people)]
    common += ["--output_dir", str(tmp_path / "measured"), *(places.get(word, word) for word in options)]
    assert evaluation.main(common) == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith(sentence)


@pytest.mark.parametrize("folder", ["people/0/cache", "photos/cache", "measured/drawn/drawn/cache"])
def test_no_cache_among_the_pictures(root, people, tmp_path, capsys, monkeypatch, folder):
    monkeypatch.setattr(drawing, "load_base", None)
    shutil.copytree(people, tmp_path / "people")
    shutil.copytree(people, tmp_path / "photos")
    common = ["--pretrained_model_name_or_path", str(root / CHECKPOINT), "--prompt", "a dog"]
    common += ["--real", str(tmp_path / "people"), "--references", str(tmp_path / "photos"), "--image_encoder"]
    common += [str(root / ENCODER), "--ip_adapter", str(root / ADAPTER), "--aggregation", "max"]
    common += ["--output_dir", str(tmp_path / "measured"), "--cache_dir", str(tmp_path / folder)]
    assert evaluation.main(common) == 1
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"--cache_dir {tmp_path / folder} is in {tmp_path / folder.split('/')[0]}")
    assert not (tmp_path / folder).exists()


def test_nothing_is_drawn_without_a_base(people, tmp_path, capsys):
    assert evaluation.main(["--prompt", "a dog", "--lora", "x", "--real", str(people), "--generated", str(people)]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "--lora and --prompt would draw nothing: give --pretrained_model_name_or_path, too.",
        "--output_dir is missing: the folder for the results.",
    ]


def test_identities_without_references_are_named(root, people, tmp_path, capsys):
    fewer = tmp_path / "fewer"
    shutil.copytree(people, fewer)
    gone = sorted(fewer.iterdir())[0]
    shutil.rmtree(gone)
    arguments = [
        *("--pretrained_model_name_or_path", str(root / CHECKPOINT), "--ip_adapter", str(root / ADAPTER)),
        *("--image_encoder", str(root / ENCODER), "--real", str(people), "--references", str(fewer)),
        *("--output_dir", str(tmp_path / "measured"), "--prompt", "a dog", "--aggregation", "average"),
    ]
    assert evaluation.main(arguments) == 1
    assert f"has no pictures of {gone.name}, whom" in capsys.readouterr().err
