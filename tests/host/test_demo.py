"""The demo's pictures come from a real server, each file through the node that loads it."""

import pytest
from finetuning import photos
from pack.training.demo import comfyui as drawing
from pack.training.demo import methods


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    place = photos(folder / "photographs", 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "STEPS", 2)
        return place, methods.make(place, "woman", folder)


def test_every_method_draws_every_prompt(comfyui, rows, monkeypatch):
    monkeypatch.setattr(drawing, "STEPS", 2)
    place, made = rows
    pictures = drawing.in_comfyui(comfyui, made, place, 2)
    assert [row.method for row in made][3:] == list(methods.TITLES)
    assert [[len(some) for some in row] for row in pictures] == [[2] * len(methods.PROMPTS)] * len(made)
    every = [one.convert("RGB").tobytes() for row in pictures for some in row for one in some]
    assert len(set(every)) == len(every), "each method, prompt and seed has a picture of its own"
    assert all(one.size == (64, 64) for row in pictures for some in row for one in some)
