"""A build of a data set that is killed, or that goes on with more pictures."""

import shutil

import pytest
import torch
from known_models import FAST, PICTURES, TEXT, files_of, groups, picture_of
from pack.models.errors import PersonalizeError
from pack.training import build_checks
from pack.training import build_subject_data as module
from pack.training.build_subject_data import build
from pack.training.look import check_same, remember
from pack.training.subject_data import METADATA, read_subjects
from pack.training.subject_progress import Progress
from PIL import Image


class Killed(BaseException):
    pass


class Deaths:
    """Everything that a build does is counted; at the given one it dies: before it, in the middle of a line, or after it."""

    def __init__(self, monkeypatch, fakes):
        self.count, self.due = 0, -1
        for name in fakes.seen:
            monkeypatch.setattr(fakes, name, self.deadly(getattr(fakes, name)))
        monkeypatch.setattr(
            Progress, "_add", self.deadly(Progress._add, lambda progress, name, lines: progress.folder / name)
        )
        monkeypatch.setattr(Progress, "end", self.deadly(Progress.end))
        monkeypatch.setattr(Image.Image, "save", self.deadly(Image.Image.save))
        for name in ("remember", "write_report"):
            monkeypatch.setattr(module, name, self.deadly(getattr(module, name)))
        write = module.write_picture
        monkeypatch.setattr(module, "write_picture", self.deadly(write, lambda folder, *rest: folder / METADATA))

    def deadly(self, work, line_in=None):
        def dies(*arguments, **more):
            self.count += 1
            way = self.count % 3 if self.count == self.due else None
            if way == 0:
                raise Killed
            done = work(*arguments, **more)
            if way == 1 and line_in and line_in(*arguments).exists():
                path = line_in(*arguments)
                path.write_bytes(path.read_bytes()[:-7])
            if way is not None:
                raise Killed
            return done

        return dies


def test_killed_anywhere_it_goes_on_to_the_same(given, tmp_path, monkeypatch, fakes):
    for name in ("white", "many_nouns", "many_boxes", "no_subject", "inside"):
        (given / f"{name}.png").unlink()
    deaths = Deaths(monkeypatch, fakes)
    build(*groups(given, tmp_path / "whole"))
    whole, steps = files_of(tmp_path / "whole"), deaths.count
    assert steps > 25
    for due in range(1, steps + 1):
        output = tmp_path / f"killed-{due}"
        deaths.count, deaths.due = 0, due
        with pytest.raises(Killed):
            build(*groups(given, output))
        known = Progress(output) if output.exists() else None
        deaths.due = -1
        for seen in fakes.seen.values():
            seen.clear()
        build(*groups(given, output))
        assert files_of(output) == whole, due
        for model, numbers in fakes.seen.items() if known else ():
            names = [PICTURES[number][0] for number in numbers]
            assert sum(map(known.is_decided, names)) < FAST["batch_size"], due
            assert model != "captioner" or not set(names) & set(known.captions), due
            assert model != "detector" or not set(names) & set(known.boxes), due
        shutil.rmtree(output)


def test_what_is_decided_is_not_looked_at_again(given, tmp_path, monkeypatch, fakes):
    output = tmp_path / "out"
    build(*groups(given, output))
    before = files_of(output)
    looked = []

    def look(path):
        looked.append(path.name)
        return visible(path)

    visible = build_checks.visible_picture
    for where in (module, build_checks):
        monkeypatch.setattr(where, "visible_picture", look)
    for seen in (*fakes.seen.values(), fakes.loaded):
        seen.clear()
    build(*groups(given, output))
    assert files_of(output) == before
    assert looked == fakes.loaded == []
    monkeypatch.setitem(PICTURES, 200, ("later", TEXT, PICTURES[10][2]))
    picture_of(200).save(given / "later.png")
    (given / "good.png").unlink()
    build(*groups(given, output, batch_size=2))
    assert set(looked) == {"later.png"}
    assert fakes.seen == {"captioner": [200], "detector": [200], "segmenter": [200]}
    lines = files_of(output)[METADATA]
    assert lines.startswith(before[METADATA])
    assert [one.path.stem for one in read_subjects(output)][-1] == "later"


def test_it_goes_on_only_as_it_began(given, tmp_path, fakes):
    output = tmp_path / "out"
    build(*groups(given, output))
    with pytest.raises(PersonalizeError) as caught:
        build(*groups(given, output, fill=0.5, detector="x/y", batch_size=1))
    assert str(caught.value) == (
        f"The data set in {output} was begun with --detector c/d (now x/y), --fill 0.6 (now 0.5): use another --output_dir."
    )
    (output / "dropped.jsonl").write_text('{"reason": ""}\n')
    with pytest.raises(PersonalizeError, match=r"Line 1 of .*dropped.jsonl is damaged: use another --output_dir\."):
        build(*groups(given, output))
    (output / "settings.json").unlink()
    with pytest.raises(PersonalizeError, match=r"has metadata.jsonl, and this command did not write it"):
        build(*groups(given, output))


def test_a_note_learns_what_is_given_later(tmp_path):
    note = tmp_path / "new" / "settings.json"
    check_same(note, {"fill": 0.6}, "It was begun", "--name")
    remember(note, {"fill": 0.6}, "--name")
    check_same(note, {"captioner": "a/b"}, "It was begun", "--name")
    remember(note, {"captioner": "a/b"}, "--name")
    with pytest.raises(PersonalizeError) as caught:
        check_same(note, {"captioner": None, "fill": 0.5}, "It was begun", "--name")
    assert str(caught.value) == (
        "It was begun with --captioner a/b (now None), --fill 0.6 (now 0.5): use another --name."
    )


def test_too_little_memory_is_told(given, tmp_path, monkeypatch, fakes):
    def full(pictures):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(fakes, "captioner", full)
    with pytest.raises(PersonalizeError, match=r"not enough memory for 3 pictures at once: use a lower --batch_size"):
        build(*groups(given, tmp_path / "out"))
