"""What a file is that was taken for another."""

import pytest
from pack.models.file_kinds import kind_of, taken_for
from pack.models.metadata import FOLDERS, About, folder_of


@pytest.mark.parametrize("method", FOLDERS)
def test_our_files_say_where_they_belong(method):
    assert kind_of(["any"], About(method))[1] == folder_of(method)


def test_a_difference_is_no_checkpoint():
    names = ["diffusion_model.out.2.bias.diff"]
    assert kind_of(names, About("dreambooth")) == (
        "a difference of DreamBooth",
        folder_of("dreambooth", difference=True),
    )


@pytest.mark.parametrize(
    ("names", "method", "sentence"),
    [
        (["a"], "base_model", "x is a checkpoint, not a LoRA: its place is models/checkpoints, for its own loader."),
        (["a"], "references", "x is saved references, not a LoRA: its place is models/references, for its own loader."),
        (["b", "a"], "judge", "x is not a LoRA (it begins with a)."),
        ([], None, "x is not a LoRA."),
        (
            ["string_to_param"],
            None,
            "x is a learned word, not a LoRA: its place is models/embeddings, for its own loader.",
        ),
        (
            ["image_proj.proj.weight"],
            None,
            "x is an IP-Adapter, not a LoRA: its place is models/ipadapter, for its own loader.",
        ),
    ],
)
def test_what_is_said_of_it(names, method, sentence):
    assert str(taken_for("a LoRA", "x", names, About(method) if method else None)) == sentence
