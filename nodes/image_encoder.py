"""CLIP_VISION from a file: every encoder that ComfyUI knows, and small ones that bring their configuration."""

import json
import tempfile
from pathlib import Path

import comfy.clip_vision
import folder_paths
from comfy_api.latest import io

from ..models.errors import PersonalizeError, plural
from ..models.references import ENCODER_ADVICE
from ..models.weight_files import VISION_CONFIG, check_finite, read_safetensors
from .folders import POCKET, find_model
from .schema import Node, schema


def _shipped() -> dict[str, Path]:
    return {path.name: path for path in sorted((POCKET / "clip_vision").glob("*.safetensors"))}


class LoadImageEncoder(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeLoadImageEncoder",
            display_name="Load Image Encoder",
            description="Loads the CLIP vision encoder that turns photographs into features for an IP-Adapter.",
            search_aliases=["clip vision", "load clip vision", "image encoder", "vit-h"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list(dict.fromkeys([*_shipped(), *folder_paths.get_filename_list("clip_vision")])),
                    tooltip="A file in models/clip_vision, or the pocket model's, which comes with the pack.",
                )
            ],
            outputs=[io.ClipVision.Output(display_name="clip_vision", tooltip="To Encode References.")],
        )

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        shipped = None if folder_paths.get_full_path("clip_vision", file) else _shipped().get(file)
        path = shipped or find_model("clip_vision", file)
        config = None
        if path.suffix == ".safetensors":
            tensors, metadata = read_safetensors(path)
            check_finite(tensors, path.name)
            config = metadata.get(VISION_CONFIG)
        if config is None:
            encoder = comfy.clip_vision.load(str(path))
        else:
            encoder = with_config(json.loads(config), tensors, path.name)
        if encoder is None:
            raise PersonalizeError(
                f"{path.name} in {path.parent} is not an image encoder that ComfyUI knows: {ENCODER_ADVICE}."
            )
        return io.NodeOutput(encoder)


def with_config(config: dict, tensors: dict, name: str) -> comfy.clip_vision.ClipVisionModel:
    """An encoder of any size, of the file `name`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"  # ComfyUI 0.8 takes a path only
        path.write_text(json.dumps(config))
        encoder = comfy.clip_vision.ClipVisionModel(str(path))
    missing, unexpected = encoder.load_sd(tensors)
    wrong = sorted({*missing, *unexpected})
    if wrong:
        raise PersonalizeError(
            f"{name} does not hold the image encoder that it describes: "
            f"{plural(len(missing), 'tensor is', 'tensors are')} missing and "
            f"{plural(len(unexpected), 'is', 'are')} of another model ({wrong[0]})."
        )
    return encoder
