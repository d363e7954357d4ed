"""Five steps of each method equal a plain loop in diffusers with the same pictures, noise and timesteps.

On the pocket model, which predicts v, and on narrow models of SD1.5's and SDXL's layouts, which predict the noise.
"""

import pytest
import torch
from finetuning import settings_of, train
from pack.models.lora import text_prefixes
from pack.training import run
from pack.training.base_model import load_base
from pack.training.dataset import Order, Sizes, find_examples
from pack.training.denoising import Weighting, draw
from pack.training.encoding import Cache, digest_of, encode_pictures
from pack.training.lora import text_config, unet_config
from pack.training.methods import text_modules
from peft import inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn.functional import mse_loss

STEPS = 5


def batches(base, settings, folder):
    """Latents, noise, timesteps and caption of each step, by the documented drawing."""
    data, vae = settings.data, base.pipeline.vae
    examples = find_examples(folder, data, Sizes(64, base.size_step, True), ("a photo of {trigger} {class}",))
    latents = encode_pictures(vae, examples, Cache(settings.folder / "cache"), digest_of(vae))
    order = Order(examples, 2, settings.training.seed)
    for number in range(STEPS):
        chosen = [examples[i] for i in order(number)]
        drawn = draw([latents[e] for e in chosen], [0, 1], settings.training.seed, number, 1000, Weighting())
        yield drawn.latents, drawn.noise, drawn.timesteps, [e.captions[0] for e in chosen]


def reference(base, groups, batches, read, words="ohwx", masked=None):
    """A plain training loop: v-prediction or the noise, AdamW, gradients of length one at most.

    Args:
        base: the model, whose parameters are in `groups`, the optimiser's.
        batches: see above.
        read: gives the text states, see below.
        words: what the trigger is read as.
        masked: called before each of the optimiser's steps.
    """
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    parameters = [p for group in groups for p in group["params"]]
    alphas = base.pipeline.scheduler.alphas_cumprod
    for z, noise, timesteps, captions in batches:
        alpha, sigma = (
            alphas[timesteps].sqrt()[:, None, None, None],
            (1 - alphas[timesteps]).sqrt()[:, None, None, None],
        )
        text, added = read(base, [caption.replace("ohwx", words) for caption in captions])
        noisy = alpha * z + sigma * noise
        prediction = base.pipeline.unet(noisy, timesteps, text, added_cond_kwargs=added).sample
        loss = mse_loss(prediction, alpha * noise - sigma * z if base.v_prediction else noise)
        loss.backward()
        if masked is not None:
            masked()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def read(base, captions):
    """Text states by transformers, and what SDXL is told besides: the pooled text, and sizes and crop."""
    outputs = []
    for tokenizer, encoder in zip(base.tokenizers, base.text_encoders, strict=True):
        ids = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        outputs.append(encoder(ids, output_hidden_states=True))
    if base.layout != "sdxl":
        return outputs[0].last_hidden_state, None
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * len(captions))
    return states, {"text_embeds": outputs[1].text_embeds, "time_ids": sizes}


def read_each(base, captions):
    """The same, each caption by itself, as it is read once before a training of the UNet alone."""
    states, added = zip(*(read(base, [caption]) for caption in captions), strict=True)
    if added[0] is None:
        return torch.cat(states), None
    return torch.cat(states), {key: torch.cat([one[key] for one in added]) for key in added[0]}


def close(ours, theirs, start):
    """Within 1e-5 of the change that the training made, in length, and the rounding of fp32."""
    change = (theirs - start).norm()
    assert change > 0
    assert (ours - theirs).norm() <= 1e-5 * change + 2**-23 * theirs.norm(), (
        f"{float((ours - theirs).norm() / change):.1e}"
    )


OPTIONS = {"train_batch_size": 2, "max_train_steps": STEPS, "learning_rate": 1e-3, "seed": 7, "resolution": 64}


@pytest.mark.parametrize("text", [False, True])
def test_lora(root, where, folder, tmp_path, text):
    options = OPTIONS | {"rank": 4, "lora_alpha": 2.0, "train_text_encoder": text, "text_encoder_lr": 1e-3}
    options |= {"pretrained_model_name_or_path": str(where)}
    settings = settings_of("lora", root, folder, tmp_path, **options)
    ours = load_file(train("lora", root, folder, tmp_path, **options)[0])
    base = load_base(str(where))
    unet = base.pipeline.unet
    torch.manual_seed(7)
    networks = {"lora_unet": unet}
    unet.requires_grad_(False)
    for encoder in base.text_encoders:
        encoder.requires_grad_(False)
    unet.add_adapter(unet_config(settings.method))
    if text:
        for encoder in base.text_encoders:
            inject_adapter_in_model(text_config(settings.method), encoder)
        networks |= dict(zip(text_prefixes(len(base.text_encoders)), base.text_encoders, strict=True))
    start = {p: {k: v.clone() for k, v in get_peft_model_state_dict(n).items()} for p, n in networks.items()}
    parameters = [p for network in networks.values() for p in network.parameters() if p.requires_grad]
    groups = [{"params": parameters, "lr": 1e-3, "weight_decay": 0.01}]
    reference(base, groups, batches(base, settings, folder), read if text else read_each)
    pairs = []
    for prefix, network in networks.items():
        for key, theirs in get_peft_model_state_dict(network).items():
            module, part = key.rsplit(".lora_", 1)
            if prefix != "lora_unet" and not module.startswith("text_model."):
                module = f"text_model.{module}"
            name = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[part]
            mine = ours[f"{prefix}_{module.replace('.', '_')}.{name}"]
            pairs.append((mine.flatten(), theirs.flatten(), start[prefix][key].flatten()))
    assert len(pairs) == len([key for key in ours if "alpha" not in key])
    close(*(torch.cat(part) for part in zip(*pairs, strict=True)))
    assert {float(value) for key, value in ours.items() if "alpha" in key} == {2.0}


def weights_of(base):
    """Copies of all weights of the UNet and the text encoders."""
    networks = {"unet": base.pipeline.unet, **dict(text_modules(base))}
    return {f"{name}.{k}": v.detach().clone() for name, net in networks.items() for k, v in net.state_dict().items()}


def test_dreambooth(root, where, folder, tmp_path):
    options = OPTIONS | {"learning_rate": 1e-4, "text_encoder_lr": 1e-4, "train_text_encoder": True}
    options |= {"save_as": "delta", "pretrained_model_name_or_path": str(where)}
    settings = settings_of("dreambooth", root, folder, tmp_path, **options)
    trained = {}
    write = run.DreamBoothMethod.write

    def keep(self, *arguments):
        trained.update(weights_of(self.base))
        return write(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.DreamBoothMethod, "write", keep)
        train("dreambooth", root, folder, tmp_path, **options)
    base = load_base(str(where))
    before = weights_of(base)
    parameters = [p for network in (base.pipeline.unet, *base.text_encoders) for p in network.parameters()]
    groups = [{"params": parameters, "lr": 1e-4, "weight_decay": 0.01}]
    reference(base, groups, batches(base, settings, folder), read)
    kept = []
    for name, theirs in weights_of(base).items():
        if torch.equal(theirs, before[name]):
            kept.append(name)
            assert torch.equal(trained[name], theirs)
        elif not name.endswith("k_proj.bias"):  # adds the same to every logit: its gradient is rounding alone
            close(trained[name], theirs, before[name])
    # SDXL reads its first encoder before the last layer
    assert kept == [name for name in before if base.layout == "sdxl" and name.startswith(UNREAD)]


UNREAD = tuple(f"text_encoder.{name}" for name in ("encoder.layers.2.", "final_layer_norm."))


def test_textual_inversion(root, where, folder, tmp_path):
    options = OPTIONS | {"num_vectors": 2, "instance_prompt": "a photo of {trigger} {class}", "learning_rate": 1e-2}
    options |= {"pretrained_model_name_or_path": str(where)}
    settings = settings_of("textual_inversion", root, folder, tmp_path, **options)
    began = []
    attach = run.TextualInversionMethod.__init__

    def keep(self, *arguments):
        attach(self, *arguments)
        began.extend(word.vectors.detach().clone() for word in self.words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.TextualInversionMethod, "__init__", keep)
        ours = load_file(train("textual_inversion", root, folder, tmp_path, **options)[0])
    base = load_base(str(where))
    base.pipeline.unet.requires_grad_(False)
    # As diffusers' example does it: the whole table trains, and the other rows are put back.
    tables = []
    for tokenizer, encoder, vectors in zip(base.tokenizers, base.text_encoders, began, strict=True):
        encoder.requires_grad_(False)
        tokenizer.add_tokens(["<a>", "<b>"])
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        tables.append(encoder.get_input_embeddings().weight)
        with torch.no_grad():
            tables[-1][-2:] = vectors
        tables[-1].requires_grad_(True)

    def masked():
        for table in tables:
            table.grad[:-2] = 0

    groups = [{"params": tables, "lr": 1e-2, "weight_decay": 0.0}]
    reference(base, groups, batches(base, settings, folder), read, "<a><b>", masked)
    names = ("clip_l", "clip_g") if base.layout == "sdxl" else ("emb_params",)
    assert ours.keys() == set(names)
    for name, table, vectors in zip(names, tables, began, strict=True):
        close(ours[name], table[-2:].detach(), vectors)
