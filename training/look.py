"""Every picture and caption is read before a model loads: how many are good, what is wrong, and what is odd."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from .concepts import Concept
from .dataset import captions_of, upright_size
from .identities import find_identities, first_of, hold_out, same_bytes
from .methods import templates_of
from .options import Data, IPAdapter, SubjectDiffusion, TextualInversion, Watching
from .settings import Settings
from .shared import PersonalizeError, call_of, list_pictures, picture_paths, read_picture, write_whole
from .subject_data import read_subjects

CARTOON = 256
"""Of the sides of a picture for the pocket model, four times what it draws."""
MASK = "has an alpha channel or a -masklabel.png that is neither black nor white all over"


def has_class_pictures(path: Path) -> bool:
    """Whether it has pictures; it can be written to, in any case.

    Raises:
        PersonalizeError: it cannot.
    """
    check_writable(path, "--class_data_dir")
    return bool(picture_paths(path))


def check_writable(folder: Path, option: str) -> None:
    """Make the folder if needed.

    Raises:
        PersonalizeError: it takes no file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PersonalizeError(
            f"The folder {folder} ({option}) cannot be written to ({error.strerror or error})."
        ) from None


def name_problems(name: str, called: bool) -> list[str]:
    """A sentence for each reason why a result cannot have this name; `called`: whether prompts call it by that."""
    problems = []
    if name.endswith(".safetensors"):
        problems.append(f"--output_name {name} is without ending: write {name.removesuffix('.safetensors')}.")
    if not name.strip() or any(letter in name for letter in '/\\:*?"<>|\0') or name.startswith("."):
        problems.append(f"{name!r} is no file name: set --output_name.")
    if called and re.search(r"[\s():,]", name):
        problems.append(f"{name!r} cannot be called in ComfyUI's prompts, which take one word: set --output_name.")
    return problems


def tell(problems: list[str], check: Callable, *arguments: Any) -> Any:
    """A check's result; what it raises goes among the problems, a line each."""
    try:
        return check(*arguments)
    except PersonalizeError as error:
        problems.extend(str(error).splitlines())
        return None


def check_same(path: Path, now: Mapping[str, Any], what: str, option: str) -> None:
    """Whether a folder goes on as it was begun: with other settings what is in it would be taken for what it is not.

    Args:
        path: of the note of `remember`, if there is one.
        now: settings by name; those that the note does not have may be any.
        what: "The benchmark in FOLDER was begun", for the message.
        option: that gives another folder.

    Raises:
        PersonalizeError: it was begun with others, or the note is damaged.
    """
    before = _noted(path, option)
    changed = [name for name in now if name in before and before[name] != now[name]]
    if changed:
        told = ", ".join(f"--{name} {before[name]} (now {now[name]})" for name in changed)
        raise PersonalizeError(f"{what} with {told}: use another {option}.")


def remember(path: Path, now: Mapping[str, Any], option: str) -> None:
    """Note the settings for the next `check_same`, beside those that are noted.

    Raises:
        PersonalizeError: the note is damaged.
    """
    before = _noted(path, option)
    after = {**before, **now}
    if after != before:
        write_whole(path, (json.dumps(after, indent=1, ensure_ascii=False) + "\n").encode())


def _noted(path: Path, option: str) -> dict[str, Any]:
    """Nothing if there is no note."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (OSError, ValueError, TypeError):
        raise PersonalizeError(f"{path} is damaged: use another {option}.") from None


@contextmanager
def alone(folder: Path | None) -> Iterator[None]:
    """Only one run writes to a folder at a time; its other processes go with the first. A new folder that stays empty goes.

    Raises:
        PersonalizeError: another one does.
    """
    if int(os.environ.get("RANK", "0")) > 0 or folder is None:
        yield
        return
    lock, new = FileLock(folder / ".lock"), not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise PersonalizeError(f"Another run writes to {folder}: wait for it, or use another --output_dir.") from None
    except (OSError, NotImplementedError):
        pass  # a check of its own tells what cannot be written; some disks have no locks
    try:
        yield
    finally:
        lock.release()
        if new and {path.name for path in folder.glob("*")} <= {".lock"}:
            (folder / ".lock").unlink(missing_ok=True)
            folder.rmdir()


def look_at_pictures(folder: Path, settings: Settings, is_prior: bool, quiet: bool) -> tuple[int, list[str], list[str]]:
    """Read every picture and caption of a folder: how many are good, what is wrong, and what is odd."""
    data, wrong, odd = settings.data, list[str](), list[str]()
    templates = (data.class_prompt,) if is_prior else templates_of(settings)
    try:
        paths = list_pictures(folder)
    except PersonalizeError as error:
        return 0, [str(error)], []
    good, masked, without = 0, 0, []
    called = call_of(data.trigger)
    for path in _bar(paths, f"Looking at {folder.name}", quiet):
        texts, has_mask = _read(path, templates, data, wrong)
        if texts is None:
            continue
        good += 1
        masked += has_mask
        if not is_prior and not any(called.search(text) for text in texts):
            without.append(path.name)
    if data.masked_loss and good and not masked and not is_prior:
        odd.append(f"--masked_loss has no effect: no picture in {folder} {MASK}.")
    if without and len(without) == good and isinstance(settings.method, TextualInversion):
        wrong.append(f"No caption in {folder} has the trigger {data.trigger!r}: the word would learn nothing.")
    elif without:
        some = ", ".join(without[:3]) + (", ..." if len(without) > 3 else "")
        odd.append(
            f"{len(without)} of {len(paths)} captions do not have the trigger {data.trigger!r} ({some}): it will not call "
            "what is learned from them."
        )
    return good, wrong, odd


def _read(path: Path, templates: Sequence[str], data: Data, wrong: list[str]) -> tuple[tuple[str, ...] | None, bool]:
    """A picture's captions, and whether it has a mask; what is wrong goes to the others, and None is returned."""
    try:
        return captions_of(path, templates, data.trigger, data.class_name), read_picture(path).mask is not None
    except PersonalizeError as error:
        wrong.append(str(error))
        return None, False


def look_at_concepts(concepts: Sequence[Concept], settings: Settings, quiet: bool) -> tuple[int, list[str], list[str]]:
    """Read every picture and caption of every concept and its class: how many are good of the concepts, what is wrong or odd."""
    good, wrong, odd = 0, list[str](), list[str]()
    classes = {one.class_folder: one for one in concepts if one.class_folder and settings.data.with_prior_preservation}
    looked = [(one, one.folder, False) for one in concepts if one.folder]
    looked += [(one, folder, True) for folder, one in classes.items() if folder]
    for one, folder, is_prior in looked:
        path = Path(folder).expanduser()
        try:
            if is_prior and not has_class_pictures(path):
                continue  # the base fills it
        except PersonalizeError as error:
            wrong.append(str(error))
            continue
        found, bad, strange = look_at_pictures(path, replace(settings, data=one.of(settings.data)), is_prior, quiet)
        good, wrong, odd = good + found * (not is_prior), wrong + bad, odd + strange
    return good, wrong, odd


def look_at_identities(folder: Path, settings: Settings, quiet: bool) -> tuple[int, list[str], list[str]]:
    """Read every picture and caption of every identity: how many are good, what is wrong, and what is odd."""
    good, wrong, templates = 0, list[str](), templates_of(settings)
    try:
        found = find_identities(folder)
        odd = found.warnings(folder)
        if not settings.data.validation_data_dir:
            _, held = hold_out(found.sets, settings.method.validation_identities, settings.training.seed)
            if settings.watching.drawn_prompts and not held:
                odd.append(
                    f"--validation_prompt has no effect: samples are of held-out identities, and of the {len(found.sets)} in "
                    f"{folder} none is held out: set --validation_identities."
                )
    except PersonalizeError as error:
        return 0, [str(error)], []
    without = 0
    for one in _bar(found.sets, f"Looking at {folder.name}", quiet):
        seen = [_read(path, templates, settings.data, wrong) for path in found.sets[one]]
        read = [has_mask for texts, has_mask in seen if texts is not None]
        good, without = good + len(read), without + (bool(read) and not any(read))
    if settings.data.masked_loss and without:
        odd.append(
            f"--masked_loss has no effect on {without} of the {len(found.sets)} identities in {folder}: none of their "
            f"pictures {MASK}."
        )
    return good, wrong, odd


def look_at_origin(concepts: Sequence[Concept], family: str | None) -> list[str]:
    """A sentence for each folder of photographs, by their size, that the pocket model is to learn from."""
    if family != "pocket":
        return []
    folders = [Path(concept.folder).expanduser() for concept in concepts if concept.folder]
    return [
        f"{folder} has pictures of more than {CARTOON} pixels. If they are photographs: the pocket model knows its own cartoons "
        "only (python -m training.pocket photos), and makes blobs of them. Train SD1.5 or SDXL on photographs."
        for folder in folders
        if folder.is_dir() and any(max(upright_size(path)) > CARTOON for path in picture_paths(folder))
    ]


def look_at_validation(concepts: Sequence[Concept], settings: Settings) -> list[str]:
    """What is odd of what the loss is measured on, where nothing is wrong with any folder."""
    data, watching, odd = settings.data, settings.watching, list[str]()
    if watching.validation_steps != Watching.validation_steps and (needed := _unvalidated(settings)):
        odd.append(
            f"--validation_steps {watching.validation_steps} says only how often loss.png is drawn, because nothing is "
            f"validated: set {needed}."
        )
    if not data.validation_data_dir:
        return odd
    folder = Path(data.validation_data_dir).expanduser()
    if isinstance(settings.method, IPAdapter):
        found, wanted = find_identities(folder).sets, settings.method.validation_identities
        if wanted is not None and wanted > len(found):
            odd.append(f"--validation_identities {wanted} are more than {folder} has: its {len(found)} are taken.")
        held = [path for one in first_of(found, wanted) for path in found[one]]
    else:
        held = _pictures_of(folder, settings)
    trained = [path for one in concepts if one.folder for path in _pictures_of(Path(one.folder).expanduser(), settings)]
    if same := same_bytes(held, trained):
        odd.append(
            f"{len(same)} of the {len(held)} pictures from {folder} to validate on are copies of pictures that are trained "
            "on, of which the validation loss says little: use others."
        )
    return odd


def _unvalidated(settings: Settings) -> str:
    """The options to set where there is nothing to measure the loss on or to draw; nothing where there is."""
    data, method = settings.data, settings.method
    if isinstance(method, IPAdapter):
        wanted = method.validation_identities
        if not data.validation_data_dir:
            sets = find_identities(Path(data.instance_data_dir or "").expanduser()).sets
            wanted = len(hold_out(sets, wanted, settings.training.seed)[1])
        return "--validation_identities" if wanted == 0 else ""
    if data.validation_data_dir:
        return ""
    if isinstance(method, SubjectDiffusion):
        return "--validation_data_dir"  # which samples are of, too
    if settings.watching.drawn_prompts:
        return ""
    alone = "--num_validation_images" if settings.watching.validation_prompt else "--validation_prompt"
    return f"{alone} or --validation_data_dir"


def _pictures_of(folder: Path, settings: Settings) -> list[Path]:
    """All that a folder has to predict."""
    if isinstance(settings.method, IPAdapter):
        return [path for pictures in find_identities(folder).sets.values() for path in pictures]
    if isinstance(settings.method, SubjectDiffusion):
        return [one.path for one in read_subjects(folder)]
    return list_pictures(folder)


def _bar(paths: Iterable[Path], text: str, quiet: bool) -> Iterable[Path]:
    return tqdm(paths, desc=text, unit="", disable=quiet, leave=False)
