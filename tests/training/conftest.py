"""What several tests of the trainers use."""

import pytest
from finetuning import CHECKPOINT, photos
from identity_sets import identities
from known_models import fakes, given
from measured_sets import copies, no_network, nothing_loads, sets
from narrow_models import narrow_folder

__all__ = ["copies", "fakes", "given", "no_network", "nothing_loads", "sets"]


@pytest.fixture
def folder(tmp_path):
    """Pictures to train on."""
    return photos(tmp_path / "photos")


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Identities to train an adapter on."""
    return identities(tmp_path_factory.mktemp("people") / "people")


@pytest.fixture(scope="module", params=["pocket", "sd15", "sdxl"])
def where(request, root, tmp_path_factory):
    """A base model: its file, or its folder."""
    if request.param == "pocket":
        return root / CHECKPOINT
    return narrow_folder(request.param, tmp_path_factory.mktemp(request.param))
