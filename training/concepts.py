"""The concepts of one training: each has pictures, a word that calls it, and a class."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .dataset import call_of
from .options import CustomDiffusion, Data
from .settings import Settings
from .shared import PersonalizeError


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
        PersonalizeError: a concept is not written as FOLDER:TRIGGER:CLASS, or two have one trigger.
    """
    data, method = settings.data, settings.method
    written: Sequence[str] = method.concept if isinstance(method, CustomDiffusion) else []
    if not written:
        return [Concept(data.instance_data_dir or "", data.trigger, data.class_name, data.class_data_dir)]
    parts, problems = [], []
    for text in written:
        folder, trigger, class_name = (["", "", "", *text.rsplit(":", 2)])[-3:]
        if not (folder and trigger.strip() and class_name.strip()):
            problems.append(f"--concept {text} is not FOLDER:TRIGGER:CLASS, such as photographs/rex:ohwx:dog.")
        parts.append((folder, trigger.strip(), class_name.strip()))
    triggers = [trigger for _, trigger, _ in parts]
    for i, one in enumerate(triggers):
        for other in triggers[:i]:
            if one and other and (call_of(one).search(other) or call_of(other).search(one)):
                problems.append(f"--concept: the triggers {other!r} and {one!r} cannot be told apart: use two words.")
    if data.instance_data_dir is not None:
        problems.append("--instance_data_dir and --concept say the same thing: give one of them.")
    if problems:
        raise PersonalizeError("\n".join(problems))
    classes, root = dict.fromkeys(class_name for _, _, class_name in parts), data.class_data_dir

    def class_folder(class_name: str) -> str | None:
        return root if root is None or len(classes) == 1 else str(Path(root) / class_name)

    return [Concept(folder, trigger, name, class_folder(name)) for folder, trigger, name in parts]
