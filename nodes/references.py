"""References: photographs of one subject, encoded; and their files."""

from itertools import chain
from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io

from ..models.errors import PersonalizeError, plural
from ..models.pictures import FRAMINGS, frame_picture, list_pictures, read_picture
from ..models.references import References, parse_weights
from .encoder import encode, encode_zero, input_size
from .folders import find_model, find_pictures, references_folder, state_of
from .pictures import MOST, connected, folder_of_pictures, growing_pictures
from .schema import ADVANCED, Node, ReferencesType, schema


class EncodeReferences(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        mask = io.Mask.Input(
            "mask", tooltip="White on the subject: the rest of the picture is painted out, and the subject is centred."
        )
        return schema(
            node_id="PersonalizeEncodeReferences",
            display_name="Encode References",
            description="Encodes photographs of one subject for IP-Adapter. Give as many as you have: from wires, "
            "from a folder, or both.",
            search_aliases=["ip-adapter encoder", "reference images", "image prompt", "clip vision encode batch"],
            inputs=[
                io.ClipVision.Input(
                    "clip_vision",
                    tooltip="The image encoder the adapter was trained with: ViT-H for nearly all of them.",
                ),
                growing_pictures("images", "image", "Pictures of the subject"),
                io.Autogrow.Input(
                    "masks",
                    template=io.Autogrow.TemplatePrefix(mask, prefix="mask", min=0, max=MOST),
                    tooltip="Optional masks: mask0 belongs to image0. An all-black or all-white one is none.",
                ),
                folder_of_pictures(
                    "instead of or besides connected ones. Photographs are turned upright; an alpha channel, or "
                    "photo-masklabel.png beside photo.jpg, is the mask"
                ),
                io.String.Input(
                    "weights",
                    default="",
                    placeholder="1, 1, 0.5 ...",
                    tooltip="One number for each picture in order (wires first, then the folder by name), or one "
                    "for all, such as 1, 1, 0.5. Empty: all 1. 2 counts a picture twice, 0 leaves it out; with max, "
                    "a weight above 0 only means that it takes part.",
                ),
                io.Combo.Input(
                    "framing",
                    options=list(FRAMINGS),
                    default="crop",
                    tooltip="How a picture without a mask becomes square: crop takes the centre, as CLIP was "
                    "trained; pad shows all of it with plain borders.",
                ),
            ],
            outputs=[
                ReferencesType.Output(display_name="references", tooltip="To Apply IP-Adapter or Save References."),
                io.Image.Output(
                    display_name="seen",
                    tooltip="The squares that the image encoder saw; preview them when a likeness is off.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder="", **_) -> str:
        return state_of(folder)

    @classmethod
    def execute(cls, clip_vision, images=None, masks=None, folder="", weights="", framing="crop") -> io.NodeOutput:
        size = input_size(clip_vision)
        paths = list_pictures(find_pictures(folder)) if folder.strip() else []
        names, framed = [], []
        # One picture at a time: a hundred photographs as they come from a camera would not fit into memory.
        for picture in chain(connected(images or {}, masks), map(read_picture, paths)):
            comfy.model_management.throw_exception_if_processing_interrupted()
            names.append(picture.name)
            framed.append(frame_picture(picture, framing, size, clip_vision.image_mean))
        if not framed:
            raise PersonalizeError("There are no reference pictures: connect an image, or write a folder of pictures.")
        weight_of_each = parse_weights(weights, names)
        pooled, patches = encode(clip_vision, framed)
        references = References(pooled, patches, encode_zero(clip_vision), torch.tensor(weight_of_each), tuple(names))
        return io.NodeOutput(references, torch.stack(framed))


class SaveReferences(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeSaveReferences",
            display_name="Save References",
            description="Writes encoded references into output/references, where Load References finds them: neither "
            "the pictures nor the image encoder are needed afterwards.",
            search_aliases=["save embeds", "ipadapter save embeds"],
            is_output_node=True,
            inputs=[
                ReferencesType.Input("references", tooltip="From Encode References."),
                io.String.Input(
                    "filename",
                    default="my_subject",
                    tooltip="May contain a folder (pets/rex); an existing file is kept, and the new one gets a number.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, references: References, filename: str) -> io.NodeOutput:
        folder = references_folder()
        parts = filename.strip().replace("\\", "/").split("/")
        if any(not part.strip(". ") or "\0" in part or ":" in part for part in parts):
            raise PersonalizeError(f'"{filename}" is not a file name inside {folder}: write for example pets/rex.')
        path = folder.joinpath(*parts[:-1], f"{parts[-1]}.safetensors")
        try:
            number = 2
            while path.exists():
                path = path.with_name(f"{parts[-1]}_{number:02}.safetensors")
                number += 1
            references.save(path)
        except OSError as error:
            raise PersonalizeError(
                f"{path.name[:300]} cannot be written to {path.parent} ({error.strerror})."
            ) from None
        return io.NodeOutput(ui={"text": (f"Saved {plural(len(references), 'reference')} to {path}",)})


class LoadReferences(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeLoadReferences",
            display_name="Load References",
            description="Loads references that Save References wrote, without the pictures and the image encoder.",
            search_aliases=["load embeds", "ipadapter load embeds"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folder_paths.get_filename_list("references"),
                    tooltip="A file in output/references or models/references.",
                ),
                io.String.Input(
                    "weights",
                    default="",
                    placeholder="1, 1, 0.5 ...",
                    tooltip="New weights, one for each reference or one for all, such as 1, 1, 0.5. Empty: as they were "
                    "saved.",
                    extra_dict=ADVANCED,
                ),
            ],
            outputs=[ReferencesType.Output(display_name="references", tooltip="To Apply IP-Adapter.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **_) -> str:
        path = folder_paths.get_full_path("references", file)
        return f"{file} {Path(path).stat().st_mtime_ns}" if path else file

    @classmethod
    def execute(cls, file: str, weights: str = "") -> io.NodeOutput:
        references = References.load(find_model("references", file))
        if weights.strip():
            references = references.with_weights(parse_weights(weights, references.names))
        return io.NodeOutput(references)
