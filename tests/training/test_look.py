"""What is odd about pictures, and what a progress bar expects."""

from types import SimpleNamespace

import pytest
from finetuning import command, photos, settings_of
from pack.training import record, run
from pack.training.preflight import preflight
from pack.training.record import untimed
from PIL import Image
from tqdm import tqdm


@pytest.mark.parametrize("method", ["lora", "custom_diffusion", "dreambooth", "textual_inversion"])
def test_photographs_are_nothing_for_the_pocket_model(root, tmp_path, method):
    folder = photos(tmp_path / "photos", 2)
    settings = settings_of(method, root, folder, tmp_path / "out")
    assert preflight(settings, quiet=True).warnings == []
    Image.effect_noise((300, 200), 80).convert("RGB").save(folder / "phone.jpg")
    (warning,) = preflight(settings, quiet=True).warnings
    assert warning.startswith(
        f"{folder} has pictures of more than 256 pixels. If they are photographs: the pocket model"
    )


def test_what_is_refused_leaves_nothing(root, tmp_path, capsys):
    options = command("lora", root, tmp_path / "gone", tmp_path / "out")[3:]
    assert run.main("lora", "", options) == 1
    assert f"The folder {tmp_path / 'gone'} does not exist." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    assert run.main("lora", "", options) == 1
    assert (tmp_path / "out").is_dir(), "a folder of the user's own stays"


def test_what_is_not_timed_does_not_count_for_the_rest(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(record, "time", SimpleNamespace(time=lambda: now[0]))
    bar = tqdm(total=100)
    bar._time, bar.start_t, bar.last_print_t = record.time.time, now[0], now[0]
    for step in range(10):
        now[0] += 1
        bar.update()
        if step == 4:
            with untimed(bar):
                now[0] += 60
    assert bar.format_dict["elapsed"] == 10
    assert bar.format_dict["rate"] == pytest.approx(1)
    bar.close()
    with untimed(tqdm(disable=True)):
        now[0] += 1
