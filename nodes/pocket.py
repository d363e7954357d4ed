"""The pocket model as one more family of ComfyUI, so that the stock loader and all that follows take its file."""

import comfy.latent_formats
import comfy.model_base
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import folder_paths
import torch

from .folders import POCKET

WIDTH, CONTEXT, CHANNELS = 96, 64, 32
TEXT = {
    "hidden_size": CONTEXT,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "vocab_size": 49408,
    "eos_token_id": 49407,
    "layer_norm_eps": 1e-5,
    "projection_dim": 96,
}
PROJECTION = "clip_l.transformer.text_projection.weight"

# Latent to picture by least squares (R² 0.96), in thousandths of -1..1, for previews while sampling.
# fmt: off
PREVIEW = (
    (-7, 61, 64), (-76, -19, -69), (-60, -42, -27), (26, 39, -8), (-9, 74, 33), (36, 6, -28), (-32, -15, -4),
    (51, 1, -4), (-14, -2, -62), (34, -26, -21), (13, 18, -22), (-18, -14, 30), (-2, -19, 3), (3, -4, -40),
    (12, -41, -57), (-9, 32, -13), (22, 82, 13), (-17, 23, -61), (0, 59, -7), (-80, -28, -54), (12, 45, 24),
    (-31, -41, -44), (6, -2, -106), (70, 28, 2), (39, -28, -19), (-23, -31, -15), (-42, 22, 25), (-87, -47, 13),
    (6, -18, 14), (13, -12, 8), (-35, -15, -66), (16, -20, -30),
)
# fmt: on


class PocketLatent(comfy.latent_formats.LatentFormat):
    latent_channels = CHANNELS
    scale_factor = 1.0
    latent_rgb_factors = [[value / 1000 for value in row] for row in PREVIEW]  # noqa: RUF012
    latent_rgb_factors_bias = [0.184, 0.211, 0.181]  # noqa: RUF012


class PocketTextModel(comfy.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(
            device=device,
            dtype=dtype,
            textmodel_json_config=dict(TEXT),
            return_projected_pooled=True,
            model_options=model_options or {},
        )
        # The host's is square. Zeros, not what lies in memory, where a file has none.
        width, place = TEXT["projection_dim"], {"dtype": dtype, "device": device}
        self.transformer.text_projection = self.operations.Linear(CONTEXT, width, bias=False, **place)
        torch.nn.init.zeros_(self.transformer.text_projection.weight)


class PocketText(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=PocketTextModel)


class PocketWords(comfy.sd1_clip.SDTokenizer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs, embedding_size=CONTEXT)


class PocketTokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=PocketWords)


class PocketPortraits(comfy.supported_models.SD15):
    """SD1.5's architecture with two levels of 96 channels, predicting v, on 32 latent channels."""

    unet_config = comfy.supported_models.SD15.unet_config | {"context_dim": CONTEXT, "model_channels": WIDTH}
    unet_extra_config = {"num_heads": -1, "num_head_channels": 32}  # noqa: RUF012
    latent_format = PocketLatent

    def model_type(self, state_dict, prefix=""):
        return comfy.model_base.ModelType.V_PREDICTION

    def inpaint_model(self):
        return False  # the host takes more than four channels for a mask's

    def process_clip_state_dict(self, state_dict):
        own = super().process_clip_state_dict(state_dict)
        moved = own.pop("clip_l.transformer.text_model.text_projection.weight", None)  # SD1.5 has none
        return own if moved is None else own | {PROJECTION: moved}

    def process_clip_state_dict_for_saving(self, state_dict):
        kept = state_dict.get(PROJECTION)
        saved = super().process_clip_state_dict_for_saving(state_dict)
        return saved if kept is None else saved | {PROJECTION.replace("clip_l.", "cond_stage_model."): kept}

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(PocketTokenizer, PocketText)


def register_pocket() -> None:
    """Make the stock loaders know the family, and list the files that the pack ships."""
    if PocketPortraits not in comfy.supported_models.models:
        comfy.supported_models.models.append(PocketPortraits)
    for kind in ("checkpoints", "ipadapter", "loras", "embeddings", "subject_diffusion", "references"):
        folder_paths.add_model_folder_path(kind, str(POCKET / kind))
