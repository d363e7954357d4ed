"""Five steps of each method equal a plain loop in diffusers with the same pictures, noise and timesteps."""

import pytest
import torch
from finetuning import CHECKPOINT, photos, settings_of, train
from pack.training.base_model import load_pipeline
from pack.training.dataset import Order, Sizes, find_examples
from pack.training.denoising import Weighting, draw
from pack.training.encoding import Cache, digest_of, encode_pictures
from pack.training.lora import text_config, unet_config
from peft import inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn.functional import mse_loss

STEPS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return photos(tmp_path_factory.mktemp("photos"))


def batches(pipeline, settings, tmp_path, trigger="ohwx"):
    """Latents, noise, timesteps and caption of each step, by the documented drawing."""
    data = settings.data
    examples = find_examples(tmp_path, data, Sizes(64, 16, True), ("a photo of {trigger} {class}",))
    latents = encode_pictures(pipeline.vae, examples, Cache(tmp_path / "cache"), digest_of(pipeline.vae))
    order = Order(examples, 2, settings.training.seed)
    for number in range(STEPS):
        chosen = [examples[i] for i in order(number)]
        drawn = draw([latents[e] for e in chosen], [0, 1], settings.training.seed, number, 1000, Weighting())
        yield drawn.latents, drawn.noise, drawn.timesteps, [e.captions[0] for e in chosen]


def reference(pipeline, parameters, rate, batches, states_of):
    """A plain training loop: v-prediction, AdamW, gradients of length one at most."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.999), weight_decay=0.01, eps=1e-8)
    alphas = pipeline.scheduler.alphas_cumprod
    for z, noise, timesteps, captions in batches:
        alpha, sigma = (
            alphas[timesteps].sqrt()[:, None, None, None],
            (1 - alphas[timesteps]).sqrt()[:, None, None, None],
        )
        prediction = pipeline.unet(alpha * z + sigma * noise, timesteps, states_of(captions)).sample
        loss = mse_loss(prediction, alpha * noise - sigma * z)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def states(pipeline, captions):
    """Text states by transformers."""
    tokenizer = pipeline.tokenizer
    ids = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return pipeline.text_encoder(ids)[0]


def close(ours, theirs, start):
    """Within 1e-5 of the change that the training made, in length, and the rounding of fp32."""
    change = (theirs - start).norm()
    assert change > 0
    assert (ours - theirs).norm() <= 1e-5 * change + 2**-23 * theirs.norm(), (
        f"{float((ours - theirs).norm() / change):.1e}"
    )


OPTIONS = {"train_batch_size": 2, "max_train_steps": STEPS, "learning_rate": 1e-3, "seed": 7}


@pytest.mark.parametrize("text", [False, True])
def test_lora(root, folder, tmp_path, text):
    options = OPTIONS | {"rank": 4, "lora_alpha": 2.0, "train_text_encoder": text, "text_encoder_lr": 1e-3}
    settings = settings_of("lora", root, folder, tmp_path, **options)
    ours = load_file(train("lora", root, folder, tmp_path, **options)[0])
    pipeline = load_pipeline(root / CHECKPOINT)
    torch.manual_seed(7)
    networks = {"lora_unet": pipeline.unet}
    pipeline.unet.requires_grad_(False)
    pipeline.text_encoder.requires_grad_(False)
    pipeline.unet.add_adapter(unet_config(settings.method))
    if text:
        inject_adapter_in_model(text_config(settings.method), pipeline.text_encoder)
        networks["lora_te"] = pipeline.text_encoder
    start = {p: {k: v.clone() for k, v in get_peft_model_state_dict(n).items()} for p, n in networks.items()}
    parameters = [p for network in networks.values() for p in network.parameters() if p.requires_grad]
    reference(pipeline, parameters, 1e-3, batches(pipeline, settings, folder), lambda c: states(pipeline, c))
    pairs = []
    for prefix, network in networks.items():
        for key, theirs in get_peft_model_state_dict(network).items():
            module, part = key.rsplit(".lora_", 1)
            if prefix == "lora_te" and not module.startswith("text_model."):
                module = f"text_model.{module}"
            name = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[part]
            mine = ours[f"{prefix}_{module.replace('.', '_')}.{name}"]
            pairs.append((mine.flatten(), theirs.flatten(), start[prefix][key].flatten()))
    assert len(pairs) == len([key for key in ours if "alpha" not in key])
    close(*(torch.cat(part) for part in zip(*pairs, strict=True)))
    assert {float(value) for key, value in ours.items() if "alpha" in key} == {2.0}


def test_dreambooth(root, folder, tmp_path):
    options = OPTIONS | {"learning_rate": 1e-4, "text_encoder_lr": 1e-4, "train_text_encoder": True}
    settings = settings_of("dreambooth", root, folder, tmp_path, **options, save_as="delta")
    pipeline = load_pipeline(root / CHECKPOINT)
    base = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    base_text = {name: value.clone() for name, value in pipeline.text_encoder.state_dict().items()}
    from pack.training import run

    trained = {}
    write = run.DreamBoothMethod.write

    def keep(self, *arguments):
        trained.update(self.base.pipeline.unet.state_dict())
        trained.update({f"text.{k}": v for k, v in self.base.pipeline.text_encoder.state_dict().items()})
        return write(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.DreamBoothMethod, "write", keep)
        train("dreambooth", root, folder, tmp_path, **options, save_as="delta")
    parameters = [*pipeline.unet.parameters(), *pipeline.text_encoder.parameters()]
    reference(pipeline, parameters, 1e-4, batches(pipeline, settings, folder), lambda c: states(pipeline, c))
    for name, theirs in pipeline.unet.state_dict().items():
        close(trained[name], theirs, base[name])
    for name, theirs in pipeline.text_encoder.state_dict().items():
        if not name.endswith("k_proj.bias"):  # adds the same to every logit: its gradient is rounding alone
            close(trained[f"text.{name}"], theirs, base_text[name])


def test_textual_inversion(root, folder, tmp_path):
    options = OPTIONS | {"num_vectors": 2, "instance_prompt": "a photo of {trigger} {class}", "learning_rate": 1e-2}
    settings = settings_of("textual_inversion", root, folder, tmp_path, **options)
    from pack.training import run

    began = []
    attach = run.TextualInversionMethod.__init__

    def keep(self, *arguments):
        attach(self, *arguments)
        began.append(self.words[0].vectors.detach().clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.TextualInversionMethod, "__init__", keep)
        ours = load_file(train("textual_inversion", root, folder, tmp_path, **options)[0])["emb_params"]
    pipeline = load_pipeline(root / CHECKPOINT)
    pipeline.unet.requires_grad_(False)
    encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    encoder.requires_grad_(False)
    # As diffusers' example does it: the whole table trains, and the other rows are put back.
    tokenizer.add_tokens(["<a>", "<b>"])
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[-2:] = began[0]
    table.requires_grad_(True)
    optimizer = torch.optim.AdamW([table], lr=1e-2, weight_decay=0.0)
    alphas = pipeline.scheduler.alphas_cumprod
    for z, noise, timesteps, captions in batches(pipeline, settings, folder):
        alpha, sigma = (
            alphas[timesteps].sqrt()[:, None, None, None],
            (1 - alphas[timesteps]).sqrt()[:, None, None, None],
        )
        text = states(pipeline, [caption.replace("ohwx", "<a><b>") for caption in captions])
        prediction = pipeline.unet(alpha * z + sigma * noise, timesteps, text).sample
        mse_loss(prediction, alpha * noise - sigma * z).backward()
        table.grad[:-2] = 0
        torch.nn.utils.clip_grad_norm_([table], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    close(ours, table[-2:].detach(), began[0])
