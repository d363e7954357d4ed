"""Training an IP-Adapter by leave-one-out: the step against a plain computation, files, resume, bad input."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from identity_sets import ADAPTER, ENCODER, train
from narrow_models import narrow_folder
from pack.models.ip_adapter import IPAdapter, read_ip_adapter
from pack.models.pictures import CLIP_MEAN
from pack.training import run
from pack.training.denoising import Weighting, draw, generator_of
from pack.training.encoding import digest_of_path
from pack.training.image_encoder import View, encode_references, load_image_encoder, square_of
from pack.training.leave_one_out import REFERENCES, Dropout, draw_references
from pack.training.shared import CLIP_STD
from pack.training.stopping import Stop
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.functional import mse_loss
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection


def prepared(monkeypatch, root, people, output, **values):
    """The trainer at its first step, which is not made."""
    caught = []

    def stop_here(trainer, start, shared):
        caught.append(trainer)
        return start

    monkeypatch.setattr(run.Trainer, "run", stop_here)
    train(root, people, output, **values)
    monkeypatch.undo()
    return caught[0]


@pytest.mark.parametrize("aggregation", ["average", "max", "concatenate", "self-attention"])
def test_loss_and_gradients_equal_a_plain_computation(monkeypatch, root, people, tmp_path, aggregation):
    """Every picture by itself, with attention, projection and aggregation written out."""
    trainer = prepared(
        monkeypatch, root, people, tmp_path, aggregation=aggregation, train_adapter=True, validation_identities=0
    )
    adapter, unet, number = trainer.method.adapter, trainer.base.pipeline.unet, 4
    if adapter.aggregator is not None:
        with torch.no_grad():
            adapter.aggregator.gate.normal_()
    loss = trainer.loss(number)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}
    for parameter in adapter.parameters():
        parameter.grad = None

    # the same batch, drawn by the documented generators
    settings, options = trainer.settings, trainer.settings.method
    examples = [trainer.examples[i] for i in trainer.order(number)]
    told = [
        draw_references(
            sorted(example.path.parent.glob("*.png")),
            example.path,
            None,
            Dropout(options.text_dropout, options.reference_dropout, options.both_dropout),
            generator_of(settings.training.seed, number, place, REFERENCES),
        )
        for place, example in enumerate(examples)
    ]
    drawn = draw([trainer.latents[e] for e in examples], [0, 1], 0, number, 1000, Weighting())
    encoder = load_image_encoder(root / ENCODER)
    rows = []
    for one in told:
        paths = [view.path for view in one.references]
        x = encode_references(encoder, paths).pooled if paths else torch.zeros(1, 96)
        if aggregation == "average":
            x = x.mean(0, keepdim=True)
        elif aggregation == "max":
            x = x.max(0, keepdim=True).values
        elif aggregation == "self-attention" and paths:
            x = plain_aggregator(adapter.aggregator, x)
        tokens = torch.nn.functional.linear(x, adapter.image_proj.proj.weight, adapter.image_proj.proj.bias)
        tokens = tokens.view(-1, 64)
        rows.append(
            torch.nn.functional.layer_norm(tokens, (64,), adapter.image_proj.norm.weight, adapter.image_proj.norm.bias)
        )
    scheduler = trainer.scheduler
    noisy = scheduler.add_noise(drawn.latents, drawn.noise, drawn.timesteps)
    target = scheduler.get_velocity(drawn.latents, drawn.noise, drawn.timesteps)
    losses = []
    plain = UNet2DConditionModel.from_config(unet.config)
    plain.load_state_dict(unet.state_dict(), strict=True)
    for i, (tokens, example, one) in enumerate(zip(rows, examples, told, strict=True)):
        install_plain_layers(plain, adapter, tokens)
        states = trainer.texts[example.captions[0] if one.text else ""].states
        prediction = plain(noisy[i : i + 1], drawn.timesteps[i : i + 1], states).sample
        losses.append(mse_loss(prediction, target[i : i + 1]))
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=0)
    expected.backward()
    theirs = {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys() == {name for name, _ in adapter.named_parameters()}
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() <= 1e-5 * theirs[name].norm()


def plain_aggregator(aggregator, x):
    """Mean + gate * PMA(SAB(x)) of [n, D], one set, written out."""
    state = dict(aggregator.named_parameters())

    def linear(name, value):
        return torch.nn.functional.linear(value, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name, value):
        return torch.nn.functional.layer_norm(value, value.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def block(name, q, kv):
        heads = aggregator.head_count
        seen = norm(f"{name}.norm_key", kv)
        inputs = {"to_q": norm(f"{name}.norm_query", q), "to_k": seen, "to_v": seen}
        queries, keys, values = (
            linear(f"{name}.{part}", x).view(len(x), heads, -1).transpose(0, 1) for part, x in inputs.items()
        )
        weights = (queries @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5).softmax(-1)
        q = q + linear(f"{name}.to_out", (weights @ values).transpose(0, 1).reshape(len(q), -1))
        hidden = torch.nn.functional.gelu(linear(f"{name}.ff.0", norm(f"{name}.norm_ff", q)))
        return q + linear(f"{name}.ff.2", hidden)

    mean = x.mean(0, keepdim=True)
    elements = linear("proj_in", norm("norm", x))
    for i in range(len(aggregator.blocks)):
        elements = block(f"blocks.{i}", elements, elements)
    pooled = block("pool", linear("proj_in", norm("norm", mean)), elements)
    return mean + state["gate"] * linear("proj_out", norm("norm_out", pooled))


def install_plain_layers(unet, adapter, tokens):
    """softmax attention written out, with the adapter's K' and V' added."""

    class Plain:
        def __init__(self, to_k, to_v):
            self.to_k, self.to_v = to_k, to_v

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
            def attend(q, k, v):
                q, k, v = (x.view(x.shape[0], x.shape[1], attn.heads, -1).transpose(1, 2) for x in (q, k, v))
                return ((q @ k.transpose(2, 3) / k.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)

            q = attn.to_q(hidden_states)
            text = attend(q, attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
            image = attend(q, self.to_k(tokens)[None], self.to_v(tokens)[None])
            return attn.to_out[1](attn.to_out[0](text + image))

    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    ours = {name: Plain(*pair) for name, *pair in zip(names, adapter.to_k_ip, adapter.to_v_ip, strict=True)}
    unet.set_attn_processor(dict(unet.attn_processors) | ours)


def test_where_only_the_aggregator_trains_every_step_has_references(monkeypatch, root, people, tmp_path):
    options = {"reference_dropout": 0.5, "both_dropout": 0.4, "validation_identities": 0}
    trainer = prepared(monkeypatch, root, people, tmp_path, **options)
    told = [trainer.method.conditioning.told(trainer.examples[0], number, 0) for number in range(100)]
    assert all(one.references for one in told)
    trainer = prepared(monkeypatch, root, people, tmp_path / "whole", train_adapter=True, **options)
    told = [trainer.method.conditioning.told(trainer.examples[0], number, 0) for number in range(100)]
    assert 80 <= sum(not one.references for one in told) <= 99


def test_a_copy_of_the_target_is_neither_target_nor_reference(monkeypatch, root, people, tmp_path):
    folder = tmp_path / "people"
    shutil.copytree(people, folder)
    for one in folder.iterdir():
        shutil.copy(sorted(one.glob("*.png"))[0], one / "zz.png")
    trainer = prepared(monkeypatch, root, folder, tmp_path / "out", validation_identities=1)
    used = {example.path.name for example in trainer.examples} | {
        path.name for paths in trainer.method.conditioning.sets.values() for path in paths
    }
    assert len(trainer.examples) == 2 * 4
    assert "zz.png" not in used


def test_the_warm_up_predicts_the_identitys_other_pictures(monkeypatch, root, people, tmp_path):
    trainer = prepared(monkeypatch, root, people, tmp_path, warmup_steps=5, max_train_steps=5, validation_identities=0)
    assert trainer.method.conditioning.early_loss([], 5, []) is None
    adapter, losses = trainer.method.adapter, []
    optimizer = torch.optim.Adam(adapter.aggregator.parameters(), 1e-2)
    for number in range(40):  # five batches, eight times
        loss = trainer.method.conditioning.early_loss(
            [trainer.examples[i] for i in trainer.order(number % 5)], number % 5, [0, 1]
        )
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(parameter.grad is None for name, parameter in adapter.named_parameters() if "aggregator" not in name)
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


@pytest.mark.parametrize("stage", ["features", "tokens"])
def test_the_warm_ups_loss_beside_the_noises(monkeypatch, root, people, tmp_path, stage):
    options = {"train_adapter": True, "aggregation_stage": stage, "validation_identities": 0}
    plain = prepared(monkeypatch, root, people, tmp_path / "plain", **options)
    both = prepared(monkeypatch, root, people, tmp_path / "both", warmup_loss_weight=3.0, **options)
    batch, places = [both.examples[i] for i in both.order(0)], [0, 1]
    assert plain.method.conditioning.loss_beside(batch, 0, places) is None
    beside = both.method.conditioning.warm_up(batch, 0, places)
    assert beside > 0
    one, other = plain.loss(0), both.loss(0)
    assert (other - one).item() == pytest.approx(3 * beside.item(), rel=1e-4)
    one.backward()
    other.backward()
    gradients = [
        {name: p.grad for name, p in trainer.method.adapter.named_parameters() if p.grad is not None}
        for trainer in (plain, both)
    ]
    for name, gradient in gradients[0].items():
        same = torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-7)
        assert same == (not name.startswith("aggregator.") or gradient.abs().max() == 0), name


def test_references_are_shown_through_squares_and_what_is_predicted_is_whole(monkeypatch, root, people, tmp_path):
    options = {
        "reference_crops": 2,
        "smallest_crop": 0.5,
        "largest_crop": 0.8,
        "warmup_steps": 5,
        "max_train_steps": 5,
        "validation_identities": 0,
    }
    trainer = prepared(monkeypatch, root, people, tmp_path, **options)
    conditioning, encoder = trainer.method.conditioning, load_image_encoder(root / ENCODER)
    told = [conditioning.told(trainer.examples[0], number, 0) for number in range(40)]
    assert {view.crop for one in told for view in one.references} == {0, 1, 2}
    mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
    for view in {view for one in told for view in one.references}:
        picture = Image.open(view.path)
        if view.crop:
            side, across, down = square_of(digest_of_path(view.path), view.crop, (0.5, 0.8))
            assert 0.5 <= side <= 0.8
            pixels = round(side * 64)
            left, top = round(across * (64 - pixels)), round(down * (64 - pixels))
            picture = picture.crop((left, top, left + pixels, top + pixels)).resize((64, 64), Image.Resampling.BICUBIC)
        seen = (torch.from_numpy(np.array(picture.convert("RGB"))) / 255 - mean) / std
        with torch.no_grad():
            wanted = encoder(seen.permute(2, 0, 1)[None]).image_embeds
        found = trainer.method.features[view]
        assert (found - wanted).abs().max() < 0.03 * wanted.abs().max(), "Pillow rounds to 8 bits when it resizes"
    asked, features = [], trainer.method.features
    monkeypatch.setattr(type(features), "__getitem__", lambda self, seen: asked.append(seen) or torch.randn(1, 96))
    target = trainer.examples[0].path
    for number in range(5):
        asked.clear()
        conditioning.early_loss([trainer.examples[0]], number, [0])
        shown = [seen for seen in asked if isinstance(seen, View)]
        predicted = [seen for seen in asked if not isinstance(seen, View)]
        assert target in predicted
        assert not {view.path for view in shown if not view.crop} & set(predicted), (
            "what is shown whole is not predicted"
        )
        pictures = set(conditioning.sets[target.parent])
        assert set(predicted) | {view.path for view in shown if not view.crop} == pictures
    with conditioning.showing([trainer.examples[0].path]):
        assert asked[-1] == trainer.examples[0].path


def test_the_self_attention_may_have_a_rate_of_its_own(monkeypatch, root, people, tmp_path):
    options = {"train_adapter": True, "learning_rate": 1e-4, "validation_identities": 0}
    for rate, expected in ((None, 1e-4), (2e-3, 2e-3)):
        trainer = prepared(monkeypatch, root, people, tmp_path / str(rate), aggregator_lr=rate, **options)
        adapter, own = trainer.method.groups
        assert (adapter["lr"], own["lr"]) == (1e-4, expected)
        assert all(name.startswith("adapter.aggregator.") for name in own["names"])
        assert not any(name.startswith("adapter.aggregator.") for name in adapter["names"])
        trained = {name for name, _ in trainer.method.adapter.named_parameters()}
        assert {f"adapter.{name}" for name in trained} == {*adapter["names"], *own["names"]}


def test_a_new_projection_learns_another_adapters_tokens(monkeypatch, root, people, tmp_path):
    options = {"ip_adapter": None, "adapter_kind": "plus", "distil_from": str(root / ADAPTER), "resampler_depth": 1}
    options |= {"distil_steps": 80, "warmup_steps": 2, "aggregation_stage": "tokens", "validation_identities": 0}
    trainer = prepared(monkeypatch, root, people, tmp_path, max_train_steps=90, learning_rate=3e-3, **options)
    teacher, adapter = read_ip_adapter(root / ADAPTER), trainer.method.adapter
    for i in range(len(adapter.to_k_ip)):
        assert torch.equal(adapter.to_k_ip[i].weight, teacher["ip_adapter"][f"{2 * i + 1}.to_k_ip.weight"].float())
    with monkeypatch.context() as patched:
        patched.setattr(trainer.base.pipeline, "unet", None)  # not needed for it
        losses = [trainer.step(number).item() for number in range(80)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert len(adapter.image_proj.layers) == 1
    assert trainer.method.conditioning.early_loss([trainer.examples[0]], 80, [0]) is not None  # the warm-up
    assert trainer.method.conditioning.early_loss([trainer.examples[0]], 82, [0]) is None
    assert trainer.step(82).isfinite()


def test_resumed_it_is_the_file_of_an_uninterrupted_run(root, people, tmp_path):
    options = {"max_train_steps": 6, "warmup_steps": 2, "checkpointing_steps": 2, "train_adapter": True}
    whole = train(root, people, tmp_path / "whole", **options)
    stop, asked = Stop(), iter([False] * 3 + [True] * 20)
    stop.asked = lambda: stop.training and next(asked)
    assert train(root, people, tmp_path / "cut", stop=stop, **options) is None
    assert (tmp_path / "cut" / "checkpoints").exists(), "stopped within its steps"
    cut = train(root, people, tmp_path / "cut", **options)
    assert cut.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("stage", ["features", "tokens"])
def test_the_file_is_official_with_the_aggregator_beside(root, people, tmp_path, stage):
    path = train(root, people, tmp_path, aggregation_stage=stage, aggregator_depth=1, aggregator_heads=4)
    state, before = read_ip_adapter(path), read_ip_adapter(root / ADAPTER)
    for part in ("image_proj", "ip_adapter"):
        assert state[part].keys() == before[part].keys()
        assert all(torch.equal(state[part][name], before[part][name].float()) for name in before[part])
    adapter = IPAdapter.from_state(state)
    pooling, aggregator = adapter.self_attention()
    assert pooling == {"features": "before projection", "tokens": "after projection"}[stage]
    assert (len(aggregator.blocks), aggregator.head_count) == (1, 4)
    assert aggregator.gate.abs().max() > 0
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert about["personalize.method"] == "ip_adapter"
    assert "personalize.trigger" not in about
    assert not any("tag_frequency" in key or "trigger" in key for key in about)
    kept = json.loads(about["personalize.settings"])
    assert kept["aggregation_stage"] == stage
    assert (kept["ip_adapter"], kept["image_encoder"]) == (ADAPTER.split("/")[-1], ENCODER.split("/")[-1])


def test_a_pooling_trains_the_adapter_and_writes_no_aggregator(root, people, tmp_path):
    path = train(root, people, tmp_path, aggregation="average", max_references=1)
    state, before = read_ip_adapter(path), read_ip_adapter(root / ADAPTER)
    assert state.keys() == {"image_proj", "ip_adapter"}
    changed = [not torch.equal(state[part][n], v.float()) for part in state for n, v in before[part].items()]
    assert all(changed)


@pytest.mark.parametrize("stage", ["features", "tokens"])
def test_started_again_from_its_own_file_it_goes_on_from_it(monkeypatch, root, people, tmp_path, stage):
    first = train(root, people, tmp_path / "first", aggregation_stage=stage)
    trainer = prepared(monkeypatch, root, people, tmp_path / "second", ip_adapter=str(first))
    assert trainer.method.adapter.stage == stage
    for name, value in trainer.method.adapter.tensors().items():
        assert torch.equal(value.cpu(), load_file(first)[name])


@pytest.mark.parametrize("kind", ["base", "plus"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_from_scratch_on_models_of_the_layouts(people, tmp_path, root, family, kind):
    base = narrow_folder(family, tmp_path / family)
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16,
        projection_dim=24,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "encoder")
    path = train(
        root,
        people,
        tmp_path / "out",
        pretrained_model_name_or_path=str(base),
        image_encoder=str(tmp_path / "encoder"),
        ip_adapter=None,
        adapter_kind=kind,
        resolution=64,
        max_train_steps=2,
        gradient_checkpointing=True,
        validation_prompt=["a photo of a person"],
        num_validation_images=1,
        validation_identities=1,
    )
    adapter = IPAdapter.from_state(read_ip_adapter(path))
    assert adapter.variant.kind == kind
    assert adapter.self_attention()[0] == "before projection"
    sample = Image.open(tmp_path / "out" / "samples" / "step-0000002.png")
    assert sample.width >= 5 * 64
    lines = (tmp_path / "out" / "log.jsonl").read_text()
    assert "validation_loss" in lines
