"""Options from the command line and a TOML file to checked dataclasses, and back to the file saved beside the output."""

import argparse
import difflib
import json
import math
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any

from .options import Base, Data, Output, Training, Watching
from .shared import PersonalizeError

METAVARS = {int: "N", float: "X", str: "TEXT"}
SHARED: tuple[type, ...] = (Base, Data, Training, Watching, Output)


@dataclass
class Settings:
    """Everything that a training is told."""

    base: Base
    data: Data
    training: Training
    watching: Watching
    output: Output
    method: Any
    """An instance of the method's own options."""

    @property
    def groups(self) -> tuple[Any, ...]:
        """The six of them."""
        return self.base, self.data, self.training, self.watching, self.output, self.method

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return Path(self.output.output_dir or ".").expanduser()

    @property
    def rate(self) -> float:
        """The learning rate; like the next two, of settings with nothing open."""
        return self.training.learning_rate or 0.0

    @property
    def text_rate(self) -> float:
        """The text encoders' learning rate."""
        return self.training.text_encoder_lr or 0.0

    @property
    def resolution(self) -> int:
        """Pixels of a square's side."""
        return self.data.resolution or 512

    def flat(self) -> dict[str, Any]:
        """All options by name."""
        return {f.name: getattr(group, f.name) for group in self.groups for f in fields(group)}


def read_settings(
    method: type,
    prog: str,
    description: str,
    arguments: list[str] | None = None,
    hints: Mapping[str, str] | None = None,
) -> Settings:
    """From the command line, over the TOML file that `--config` names, over the defaults.

    Args:
        method: its options.
        prog, description: for --help.
        arguments: of the command line.
        hints: for --help: the defaults of options that are open.

    Raises:
        PersonalizeError: the file cannot be read, or any option is wrong; all that are wrong are named at once.
        SystemExit: after --help, or for an option without its value.
    """
    given, values = read_values((*SHARED, method), prog, description, arguments, hints)
    for name, other in (("max_train_steps", "num_train_epochs"), ("num_train_epochs", "max_train_steps")):
        if name in given and other not in given:
            values.pop(other, None)  # the command line says how long
    return make_settings(method, {**values, **given})


def read_values(
    groups: tuple[type, ...],
    prog: str,
    description: str,
    arguments: list[str] | None = None,
    hints: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the command line gives, and what the TOML file does, unchecked, by name.

    Args:
        groups: dataclasses of options.
        prog, description, arguments, hints: see `read_settings`.

    Raises:
        PersonalizeError: the file cannot be read, or an option is none.
        SystemExit: after --help, or for an option without its value.
    """
    words = [_underscored(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    parsed, others = _parser(groups, prog, description, hints or {}).parse_known_args(words)
    given = vars(parsed)
    if others:
        names = [other.partition("=")[0].removeprefix("--") for other in others if other.startswith("--")]
        known = {f.name: f for group in groups for f in fields(group)}
        problems = [_unknown(name, known) for name in names] or [f"{others[0]} is no option; see --help."]
        raise PersonalizeError("\n".join(problems))
    config = given.pop("config", None)
    return given, {} if config is None else _read_toml(Path(config).expanduser(), groups)


def exit_status(work: Callable[[], object]) -> int:
    """Of a command that does `work`: 1 if something is wrong, which is said in its own words, else 0."""
    try:
        work()
    except PersonalizeError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error.filename or 'A file'} cannot be read or written ({error.strerror or error}).", file=sys.stderr)
        return 1
    return 0


def make_settings(method: type, values: dict[str, Any]) -> Settings:
    """From values by name, as a node or a test has them.

    Raises:
        PersonalizeError: naming all that are wrong.
    """
    return Settings(*make_groups((*SHARED, method), values))


def make_groups(groups: tuple[type, ...], values: dict[str, Any]) -> list[Any]:
    """An instance of each group of options, from values by name.

    Raises:
        PersonalizeError: naming all that are wrong.
    """
    known = {f.name: f for group in groups for f in fields(group)}
    values = dict(_own_name(name, value, known) for name, value in values.items())
    problems = [_unknown(name, known) for name in values if name not in known]
    kinds = {name: kind for group in groups for name, kind in typing.get_type_hints(group).items()}
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name in known:
            problem, checked[name] = _check(name, value, kinds[name], known[name].metadata)
            problems += [problem] * bool(problem)
    if problems:
        raise PersonalizeError("\n".join(problems))
    return [group(**{f.name: checked[f.name] for f in fields(group) if f.name in checked}) for group in groups]


def save_settings(settings: Settings, path: Path) -> None:
    """As TOML, a table for each group; what is None is left out."""
    parts = []
    for group in settings.groups:
        title = (type(group).__doc__ or "").strip()
        lines = [f"{f.name} = {_toml(v)}" for f in fields(group) if (v := getattr(group, f.name)) is not None]
        parts.append("\n".join([f"# {title}", f"[{type(group).__name__.lower()}]", *lines]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _toml(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)  # strings, numbers, booleans and lists are written alike,
    return text.replace("\x7f", "\\u007f")  # but for DEL


def _own_name(name: str, value: Any, known: Mapping[str, Field]) -> tuple[str, Any]:
    """An option by our name, where it was given by another trainer's."""
    for f in known.values():
        if name in f.metadata["also"]:
            return f.name, value
        if name in f.metadata["switches"]:
            return f.name, f.metadata["switches"][name] if value is True else f.default if value is False else value
    return name, value


def _underscored(word: str) -> str:
    """An option written with hyphens, as --max-train-steps, by its name."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    negative = "no-" if name.startswith(("no-", "no_")) else ""
    return f"--{negative}{name[len(negative) :].replace('-', '_')}{equals}{value}"


def _parser(groups: tuple[type, ...], prog: str, description: str, hints: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE] [options]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="a TOML file with any of these; see training/configs",
    )
    for group in groups:
        section = parser.add_argument_group((group.__doc__ or "").strip())
        kinds = typing.get_type_hints(group)
        for f in fields(group):
            kind, text = _plain(kinds[f.name]), f.metadata["help"]
            hidden = f.default is None or f.default is MISSING or f.default is False
            shown = hints.get(f.name, "") if hidden else "on" if f.default is True else f.default
            extra: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": f.name}
            if kind is bool:
                extra |= {"action": argparse.BooleanOptionalAction}
            elif kind is list:
                extra |= {"action": "append", "metavar": "TEXT"}
                if f.metadata["choices"]:
                    text += f" ({', '.join(f.metadata['choices'])})"
            else:
                extra |= {"type": _number(kind), "metavar": METAVARS[kind]}
                for name, value in f.metadata["switches"].items():
                    what = {"const": value, "default": argparse.SUPPRESS, "dest": f.name}
                    section.add_argument(f"--{name}", action="store_const", help=f"--{f.name} {value}", **what)
                if f.metadata["choices"]:
                    text += f" ({', '.join(f.metadata['choices'])})"
            if shown != "":
                text += f" [{shown}]"
            names = [f"--{name}" for name in (f.name, *f.metadata["also"])]
            section.add_argument(*names, help=text.replace("%", "%%"), **extra)
    return parser


def _number(kind: type):
    """Leaves to `_check` what is no number, so that all problems are told at once."""

    def convert(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            return text

    return convert


def _plain(kind: Any) -> type:
    """The type of an option that may be None."""
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    return typing.get_origin(kind) or kind


def _read_toml(path: Path, groups: tuple[type, ...]) -> dict[str, Any]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PersonalizeError(f"The configuration {path} does not exist.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PersonalizeError(f"The configuration {path} cannot be read: {error}.") from None
    names = {group.__name__.lower() for group in groups}
    values: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, dict):
            if key.replace("_", "") not in names:
                raise PersonalizeError(
                    f"[{key}] in {path} is no group of options: they are {', '.join(sorted(names))}."
                )
            values |= value
        else:
            values[key] = value
    return values


def _unknown(name: str, known: dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"There is no option {name}{f': do you mean {near[0]}?' if near else '; see --help.'}"


def _check(name: str, value: Any, kind: Any, metadata: Any) -> tuple[str, Any]:
    """A sentence about what is wrong, or nothing, and the value."""
    plain = _plain(kind)
    if value is None and type(None) in typing.get_args(kind):
        return "", None
    if plain is float and type(value) is int:
        value = float(value)
    if type(value) is not plain:
        wanted = {
            bool: "true or false",
            int: "a whole number",
            float: "a number",
            str: "a text",
            list: "a list of texts",
        }
        return f"{name} is {value!r}, but must be {wanted[plain]}.", value
    if isinstance(value, list) and not all(isinstance(entry, str) for entry in value):
        return f"{name} is {value!r}, but must be a list of texts.", value
    if isinstance(value, float) and not math.isfinite(value):
        return f"{name} is {value}, but must be a finite number.", value
    choices, least, below = metadata["choices"], metadata["least"], metadata["below"]
    for one in value if isinstance(value, list) else [value]:
        if choices and one not in choices:
            return f"{name} is {one!r}, but must be one of {', '.join(choices)}.", value
    if metadata["above"] is not None and not value > metadata["above"]:
        return f"{name} is {value}, but must be above {metadata['above']}.", value
    if least is not None and not value >= least:
        return f"{name} is {value}, but must be at least {least}.", value
    if metadata["most"] is not None and not value <= metadata["most"]:
        return f"{name} is {value}, but must be at most {metadata['most']}.", value
    if below is not None and not value < below:
        return f"{name} is {value}, but must be below {below}.", value
    return "", value
