"""What several tests of the trainers use."""

import pytest
from finetuning import photos
from measured_sets import copies, no_network, nothing_loads, sets

__all__ = ["copies", "no_network", "nothing_loads", "sets"]


@pytest.fixture
def folder(tmp_path):
    """Pictures to train on."""
    return photos(tmp_path / "photos")
