"""Trainers: LoRA, Textual Inversion and DreamBooth from pictures on wires, by the code of `python -m training.<method>`."""

from typing import Any

import folder_paths
from comfy_api.latest import io

from ..models.words import TRIGGER as TRIGGER_WORD
from .folders import state_of
from .personalization import TRIGGER
from .pictures import folder_of_pictures, growing_pictures
from .schema import ADVANCED, Node, schema
from .training_run import SAMPLE_STEPS, lost, train

SUBJECT = (
    "The word that will call the subject, followed by its class.",
    "'a photo of {trigger} {class}'",
    "a photo of {trigger} {class}",
)
"""Of trigger, captions and samples, where a subject is called by its trigger and class."""


def _shared(trigger: str, caption: str, sample: str, style: str = "") -> list[Any]:
    """What all methods ask: `caption` is of pictures without one, `sample` and for a style `style` are drawn."""
    open_ = "0: what suits the base model and the method."
    return [
        io.Combo.Input(
            "checkpoint",
            options=folder_paths.get_filename_list("checkpoints"),
            tooltip="The base model: SD1.5, SD2, SDXL or pocket portraits. It stays as it is.",
        ),
        growing_pictures("images", "image", "Pictures of the subject, five to twenty"),
        folder_of_pictures("instead of connected ones. photo.txt beside photo.jpg is its caption"),
        io.String.Input(
            "class_name", default="person", tooltip="What the subject is, as one noun: dog, backpack, woman, logo."
        ),
        io.String.Input("trigger", default=TRIGGER_WORD, tooltip=trigger),
        io.String.Input(
            "name",
            default="my_subject",
            tooltip="Of the file. An existing file is kept, and the new one gets a number. Cancelled, the same inputs go on "
            "from the last step; finished, they are not trained again.",
        ),
        io.Int.Input(
            "steps",
            display_name="steps (0: automatic)",
            default=0,
            min=0,
            max=1_000_000,
            tooltip=f"Steps of the optimiser. {open_}",
        ),
        io.Float.Input(
            "learning_rate",
            display_name="learning_rate (0: automatic)",
            default=0.0,
            min=0.0,
            max=1.0,
            step=1e-6,
            round=1e-9,
            tooltip=f"How much changes in a step. {open_}",
        ),
        io.Int.Input(
            "resolution",
            display_name="resolution (0: automatic)",
            default=0,
            min=0,
            max=4096,
            step=8,
            tooltip=f"Pixels of the side. {open_}",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**32 - 1,
            control_after_generate=False,  # or each queueing would train another file
            tooltip="The same seed and pictures give the same file.",
        ),
        io.String.Input(
            "captions",
            default="",
            multiline=True,
            tooltip="Of the connected pictures, one in each line; {trigger} and {class} are put in. Empty: "
            f"{caption}.",
            extra_dict=ADVANCED,
        ),
        io.String.Input(
            "sample_prompt",
            default=sample,
            tooltip=f"Drawn while it trains, and shown on the node{style}. Empty: nothing is.",
            extra_dict=ADVANCED,
        ),
        io.Int.Input(
            "sample_steps",
            default=SAMPLE_STEPS,
            min=1,
            max=1_000_000,
            tooltip="Steps between samples.",
            extra_dict=ADVANCED,
        ),
        io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Pictures in each step.", extra_dict=ADVANCED),
        io.Boolean.Input(
            "gradient_checkpointing", default=False, tooltip="Less memory, a third slower.", extra_dict=ADVANCED
        ),
    ]


def _outputs() -> list[Any]:
    return [
        io.Model.Output(display_name="MODEL", tooltip="The base model, which knows the subject at once."),
        io.Clip.Output(display_name="CLIP", tooltip="Its text encoders."),
        io.Vae.Output(display_name="VAE", tooltip="Its VAE."),
        io.String.Output(display_name="trigger", tooltip=TRIGGER),
        io.String.Output(
            display_name="file",
            tooltip="The file that was written, which the loaders list after a refresh. All beside it (checkpoints, "
            "samples, the loss curve, the log, all settings) is in output/personalize.",
        ),
        io.Image.Output(
            display_name="samples",
            tooltip="The last pictures of the sample prompt; without one, the loss over the steps.",
        ),
    ]


class TrainLora(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeTrainLoRA",
            display_name="Train LoRA (Personalize)",
            description="Trains a LoRA (Hu et al. 2022) on pictures of a subject: details at small size. The file "
            "lands in models/loras.",
            search_aliases=["train lora", "lora trainer", "fine-tune"],
            inputs=[
                *_shared(*SUBJECT),
                io.Int.Input(
                    "rank",
                    default=16,
                    min=1,
                    max=256,
                    tooltip="Width of the low-rank matrices: more holds more details, in a larger file.",
                ),
                io.Boolean.Input(
                    "train_text_encoder", default=False, tooltip="Change the text encoders, too.", extra_dict=ADVANCED
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, folder="", name="", **_) -> str:
        return state_of(folder) + lost(name)

    @classmethod
    def execute(cls, rank: int, train_text_encoder: bool = False, **shared) -> io.NodeOutput:
        return train("lora", shared, {"rank": rank, "train_text_encoder": train_text_encoder or None})


class TrainTextualInversion(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeTrainTextualInversion",
            display_name="Train Textual Inversion",
            description="Learns a word for a subject or a style (Gal et al. 2022): a tiny file, for looks rather "
            "than details. The file lands in models/embeddings.",
            search_aliases=["train embedding", "textual inversion trainer"],
            inputs=[
                *_shared(
                    "Stands for the learned word in captions and sample prompts; prompts in ComfyUI call it by the file's "
                    "name, embedding:my_subject.",
                    "'a photo of {trigger}' and others like it",
                    "a picture of {trigger}",
                    "; for a style, 'a cat in the style of {trigger}'",
                ),
                io.Int.Input(
                    "num_vectors", default=4, min=1, max=74, tooltip="Tokens of the word: more hold more details."
                ),
                io.Combo.Input(
                    "learnable_property",
                    options=["object", "style"],
                    tooltip="Whether the word is for what the pictures show, or for how.",
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, folder="", name="", **_) -> str:
        return state_of(folder) + lost(name)

    @classmethod
    def execute(cls, num_vectors: int, learnable_property: str, **shared) -> io.NodeOutput:
        own = {"num_vectors": num_vectors, "learnable_property": learnable_property}
        return train("textual_inversion", shared, own)


class TrainDreamBooth(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeTrainDreamBooth",
            display_name="Train DreamBooth",
            description="Trains the whole model on pictures of a subject (Ruiz et al. 2023): the best likeness, in a "
            "large file. A checkpoint lands in models/checkpoints, a difference in models/loras.",
            search_aliases=["dreambooth trainer", "fine-tune checkpoint"],
            inputs=[
                *_shared(*SUBJECT),
                io.Combo.Input(
                    "save_as",
                    options=["full", "delta"],
                    tooltip="A whole checkpoint, or its difference from the base, which has a strength.",
                ),
                io.Int.Input(
                    "class_pictures",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Prior preservation: so many pictures of the class, drawn by the base, keep it what it "
                    "was; 0 does without.",
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, folder="", name="", **_) -> str:
        return state_of(folder) + lost(name)

    @classmethod
    def execute(cls, save_as: str, class_pictures: int, **shared) -> io.NodeOutput:
        own: dict[str, Any] = {"save_as": save_as}
        if class_pictures:
            own |= {"with_prior_preservation": True, "num_class_images": class_pictures}
        return train("dreambooth", shared, own)
