"""The concepts of one training: each has pictures, a word that calls it, and a class."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .clip_tokenizer import clip_tokenizer
from .options import CustomDiffusion, Data
from .settings import Settings
from .shared import FRAMES, RARE, PersonalizeError, call_of, plural


@dataclass(frozen=True)
class Concept:
    """A subject to learn."""

    folder: str
    """With its pictures, as the user wrote it."""
    trigger: str
    class_name: str
    class_folder: str | None
    """With pictures of others of the class."""

    def of(self, data: Data) -> Data:
        """The data's options as they are for this concept alone."""
        return replace(
            data,
            instance_data_dir=self.folder,
            trigger=self.trigger,
            class_name=self.class_name,
            class_data_dir=self.class_folder,
        )


def concepts_of(settings: Settings) -> list[Concept]:
    """Those of --concept, or the one of --instance_data_dir, --trigger and --class_name.

    With several classes, the pictures of each class are in a folder of its name in --class_data_dir.

    Raises:
        PersonalizeError: a concept is not written as FOLDER:TRIGGER:CLASS, cannot be called, or not be told from another.
    """
    data, method = settings.data, settings.method
    if not isinstance(method, CustomDiffusion):
        return [Concept(data.instance_data_dir or "", data.trigger, data.class_name, data.class_data_dir)]
    parts, problems = [(data.instance_data_dir or "", data.trigger, data.class_name)], list[str]()
    if method.concept:
        parts = []
        for text in method.concept:
            folder, trigger, class_name = (["", "", "", *text.rsplit(":", 2)])[-3:]
            parts.append((folder, trigger.strip(), class_name.strip()))
            if not all(parts[-1]):
                problems.append(f"--concept {text} is not FOLDER:TRIGGER:CLASS, such as photographs/rex:ohwx:dog.")
        if data.instance_data_dir is not None:
            problems.append("--instance_data_dir and --concept say the same thing: give one of them.")
    for i, (_, trigger, class_name) in enumerate(parts):
        if not class_name and not method.concept:
            problems.append("--class_name is empty: say what the subject is, as one noun: dog, woman, mug.")
        if trigger and (call_of(trigger).search(class_name) or any(map(call_of(trigger).search, FRAMES))):
            problems.append(f"The trigger {trigger!r} is a word that captions say anyway: take one that is in none.")
        if trigger and not re.fullmatch(r"[\w.+-]+", trigger):
            problems.append(f"The trigger {trigger!r} cannot be called in ComfyUI's prompts: take one word of letters.")
        if re.search(r"[,():/\\]", class_name):
            problems.append(
                f"The class {class_name!r} has a comma, a colon, a bracket or a slash, which a prompt or a folder reads as its own."
            )
        for k, (_, other, its_class) in enumerate(parts):
            same = k < i and other.casefold() == trigger.casefold()
            if trigger and (same or (k != i and call_of(trigger).search(f"{other} {its_class}"))):
                problems.append(f"The triggers {other!r} and {trigger!r} cannot be told apart: use two words.")
    if problems:
        raise PersonalizeError("\n".join(dict.fromkeys(problems)))
    classes, root = dict.fromkeys(class_name for _, _, class_name in parts), data.class_data_dir

    def class_folder(class_name: str) -> str | None:
        return root if root is None or len(classes) == 1 else str(Path(root) / class_name)

    return [Concept(folder, trigger, name, class_folder(name)) for folder, trigger, name in parts]


def check_places(concepts: Sequence[Concept], output: str | None) -> list[str]:
    """A sentence for each folder that would be written to and read as a subject's pictures, or read as two subjects'.

    Args:
        concepts: of a training.
        output: its folder.
    """
    problems = []
    own: dict[Path, Concept] = {}
    for one in concepts:
        first = own.setdefault(Path(one.folder).expanduser().resolve(), one) if one.folder else one
        if first is not one:
            problems.append(
                f"{one.folder} is given to {first.trigger} and to {one.trigger}: each needs its own pictures."
            )
    written = {"--output_dir": output} | {f"class_data_dir of {one.class_name}": one.class_folder for one in concepts}
    for what, place in written.items():
        if place and (read := own.get(Path(place).expanduser().resolve())):
            problems.append(
                f"{read.folder} has {read.trigger}'s pictures and is {what}, too: what is written would be trained on."
            )
    return problems


def check_start(method: CustomDiffusion, concepts: Sequence[Concept]) -> list[str]:
    """A sentence where the words of concepts have nothing to start as."""
    chosen = starts_of(method)
    if len(chosen) < len(concepts):
        given = "names" if method.initializer_token is not None else "has by default"
        return [
            f"--initializer_token {given} {plural(len(chosen), 'word')} for {len(concepts)} concepts: name one for "
            f"each, with commas "
            "between."
        ]
    problems = []
    for word in chosen if method.initializer_token is not None else ():
        count = len(clip_tokenizer()(word, add_special_tokens=False).input_ids)
        if count != 1 and word not in RARE:
            problems.append(f"--initializer_token {word!r} is {count} tokens, but must be a single one.")
    return problems


def starts_of(method: CustomDiffusion) -> tuple[str, ...]:
    """What the words start as, in the order of the concepts."""
    given = method.initializer_token
    return RARE if given is None else tuple(word.strip() for word in given.split(","))
