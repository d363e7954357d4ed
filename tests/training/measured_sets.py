"""Sets of pictures whose truth is known, for the tests of the evaluation."""

import json
import shutil
import socket
from dataclasses import asdict

import numpy as np
import pytest
from pack.training import features
from pack.training.evaluate import Evaluation
from pack.training.pocket.attributes import sample_scene
from pack.training.pocket.data import identity
from pack.training.pocket.draw import draw
from pack.training.pocket.photos import SUBJECTS

PEOPLE = 5
DRAWS = 60


def write(folder, first, seed, pictures=4):
    """A folder for each of PEOPLE, "0", "1"...: drawings of identities from `first`, and what was asked for."""
    for number in range(PEOPLE):
        who, place = identity(SUBJECTS, first + number), folder / str(number)
        place.mkdir(parents=True)
        for i in range(pictures):
            rng = np.random.default_rng([seed, number, i])
            scene = sample_scene(rng, (who,))
            shown = scene.subjects[0]
            draw(scene).save(place / f"{i}.png")
            said = {"pose": shown.pose, "expression": shown.expression, "background": scene.background, "seed": i}
            (place / f"{i}.json").write_text(json.dumps(said))
            (place / f"{i}.txt").write_text(f"a {who.kind}, ohwx, {shown.expression}, in front of {scene.background}")
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Real pictures, other drawings of the same people, and drawings of others under their names."""
    base = tmp_path_factory.mktemp("sets")
    real = write(base / "real", 0, 1)
    for number in range(PEOPLE):
        (real / str(number) / "attributes.json").write_text(json.dumps(asdict(identity(SUBJECTS, number))))
    return {"real": real, "good": write(base / "good", 0, 2), "bad": write(base / "bad", 100, 3)}


@pytest.fixture
def copies(sets, tmp_path):
    """The same, to be changed."""
    return {name: shutil.copytree(folder, tmp_path / "sets" / name) for name, folder in sets.items()}


def options(sets, output, methods=("good", "bad"), **values):
    made = {"bootstrap_draws": DRAWS, "generated": [str(sets[name]) for name in methods], "real": str(sets["real"])}
    return Evaluation(**{**made, "output_dir": str(output), **values})


@pytest.fixture
def nothing_loads(monkeypatch):
    def load(*arguments):
        raise AssertionError("a network was loaded")

    for eye in ("JudgeEye", "InceptionEye", "ClipEye", "PocketClipEye", "DinoEye"):
        monkeypatch.setattr(features, eye, load)


@pytest.fixture
def no_network(monkeypatch):
    def connect(*arguments):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", connect)
