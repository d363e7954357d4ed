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
            "mask", tooltip="Where the subject is (white) in the picture of the same number; the rest is painted out."
        )
        return schema(
            node_id="PersonalizeEncodeReferences",
            display_name="Encode References",
            description="Encodes any number of photographs of one subject for IP-Adapter.",
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
                    tooltip="Optional masks: mask0 belongs to image0, mask1 to image1.",
                ),
                folder_of_pictures(
                    "instead of or besides connected ones: a folder inside ComfyUI's input folder or a full path. An alpha "
                    "channel, or photo-masklabel.png beside photo.jpg, is the mask."
                ),
                io.String.Input(
                    "weights",
                    default="",
                    placeholder="1, 1, 0.5 ...",
                    tooltip="Weight of each picture in order, for example 1, 1, 0.5. Empty: all 1. 2 counts a picture "
                    "twice, 0 leaves it out.",
                ),
                io.Combo.Input(
                    "framing",
                    options=list(FRAMINGS),
                    default="crop",
                    tooltip="How a picture becomes square: crop its centre, or pad it so that all of it is seen. "
                    "A picture with a mask is centred on its subject either way.",
                ),
            ],
            outputs=[
                ReferencesType.Output(display_name="references", tooltip="To Apply IP-Adapter or Save References."),
                io.Image.Output(display_name="seen", tooltip="The pictures as the image encoder sees them."),
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
            description="Saves encoded references, so that they load without the pictures and the image encoder.",
            search_aliases=["save embeds", "ipadapter save embeds"],
            is_output_node=True,
            inputs=[
                ReferencesType.Input("references", tooltip="From Encode References."),
                io.String.Input(
                    "filename",
                    default="my_subject",
                    tooltip="Saved as output/references/<filename>.safetensors; an existing file is kept, and the "
                    "new one gets a number.",
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
            description="Loads references that Save References wrote.",
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
                    tooltip="New weights, one for each reference, for example 1, 1, 0.5. Empty: as they were saved.",
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
