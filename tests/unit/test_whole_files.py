"""A file is there whole, or what was there before is."""

import pytest
from pack.models.whole_files import sweep, whole, write_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_the_place_of_the_one_before(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_whole(path, b"one")
    with whole(path) as part:
        part.write_bytes(b"two")
        assert path.read_bytes() == b"one"
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["a.txt"]


def test_a_folder_takes_the_place_of_the_one_before(tmp_path):
    path = tmp_path / "a"
    for name in ("one", "two"):
        with whole(path) as part:
            part.mkdir()
            (part / name).write_text(name)
            assert not (path / name).exists()
    assert names(path) == ["two"]
    assert names(tmp_path) == ["a"]


def failing(path, error, names):
    """Write some files, then fail."""
    with whole(path) as part:
        for name in names:
            part.mkdir(exist_ok=True)
            (part / name).write_text("half")
        if not names:
            part.write_text("half")
        raise error


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_fails_leaves_everything_as_it_was(tmp_path, error):
    path = tmp_path / "a.txt"
    write_whole(path, b"one")
    with pytest.raises(error):
        failing(path, error, [])
    with pytest.raises(error):
        failing(tmp_path / "b", error, ["c"])
    with pytest.raises(FileNotFoundError), whole(path):
        pass  # nothing is written
    assert path.read_bytes() == b"one"
    assert names(tmp_path) == ["a.txt"]


def test_what_a_killed_process_left_is_swept(tmp_path):
    (tmp_path / ".a.txt.1.part").write_text("half")
    (tmp_path / ".b.1.part").mkdir()
    (tmp_path / "c.part").write_text("mine")
    sweep(tmp_path)
    assert names(tmp_path) == ["c.part"]
