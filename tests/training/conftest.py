"""What several tests of the trainers use."""

import pytest
from finetuning import photos


@pytest.fixture
def folder(tmp_path):
    """Pictures to train on."""
    return photos(tmp_path / "photos")
