"""Structural models for tests and, until real weights ship, for the demo.

Imported by tests it waits. Linked into the custom_nodes of a temporary ComfyUI it registers the miniature, and makes
the files that the shipped workflows name.
"""

from pathlib import Path

from . import checkpoints

NODE_CLASS_MAPPINGS: dict[str, type] = {}

NAMED = {
    "checkpoints/v1-5-pruned-emaonly-fp16.safetensors": checkpoints.miniature_checkpoint,
    "clip_vision/CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors": checkpoints.small_image_encoder,
    "ipadapter/ip-adapter-plus_sd15.safetensors": lambda path: checkpoints.miniature_adapter("plus", path),
}


def make_named_files(models: Path) -> None:
    """The files that the workflows name, with random weights, where they are missing."""
    for name, make in NAMED.items():
        path = models / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            make(path)


if __name__ != "structural":
    import folder_paths

    checkpoints.register()
    make_named_files(Path(folder_paths.models_dir))
