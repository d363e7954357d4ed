"""Where the files lie: model folders in ComfyUI's registry, and folders of pictures."""

from pathlib import Path

import folder_paths

from ..models.errors import PersonalizeError

PACK = Path(__file__).resolve().parent.parent
EXAMPLES = PACK / "workflows"
POCKET = PACK / "models" / "pocket"
"""The pocket model's files, which come with the pack."""


def register_folders() -> None:
    """Add our folders to the registry. Folders that others or extra_model_paths.yaml have added stay."""
    _register("ipadapter", Path(folder_paths.models_dir) / "ipadapter", set(folder_paths.supported_pt_extensions))
    _register("subject_diffusion", Path(folder_paths.models_dir) / "subject_diffusion", {".safetensors"})
    _register("references", Path(folder_paths.models_dir) / "references", {".safetensors"})
    _register("references", references_folder(), {".safetensors"})


def _register(name: str, folder: Path, extensions: set[str]) -> None:
    # add_model_folder_path alone leaves a new folder without an extension filter, so every file would be listed.
    paths, known = folder_paths.folder_names_and_paths.get(name, ([], set()))
    folder_paths.folder_names_and_paths[name] = (paths, set(known) | extensions)
    folder_paths.add_model_folder_path(name, str(folder))


def references_folder() -> Path:
    """Where Save References writes."""
    return Path(folder_paths.get_output_directory()) / "references"


def find_model(kind: str, name: str) -> Path:
    """The file `name` of a registered folder. Raises PersonalizeError that names the folders looked in."""
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        folders = ", ".join(folder_paths.get_folder_paths(kind))
        raise PersonalizeError(f"{name} is not in {folders}: put it there and refresh.")
    return Path(path)


LORA = "pocket_woman_lora.safetensors"
"""An example that comes with the pack."""


def listed(kind: str, first: str = "") -> list[str]:
    """The files of a registered folder, with the one that a new node shows in front, if it is there."""
    return sorted(folder_paths.get_filename_list(kind), key=lambda name: name != first)


def find_pictures(name: str) -> Path:
    """A folder of pictures: a full path, a folder in ComfyUI's input folder, or one of the pack's examples."""
    places = _places(name)
    found = _first(places)
    if found is None:
        raise PersonalizeError(
            f'There is no folder "{name[:300]}" (looked for {_looked(places)}): write a folder with pictures.'
        )
    if found.is_file():
        raise PersonalizeError(f"{found} is a file: write the folder it is in, or connect it as an image.")
    return found


def find_picture(name: str) -> Path:
    """A picture's file, looked for as `find_pictures` does."""
    places = _places(name)
    found = _first(places)
    if found is None or found.is_dir():
        raise PersonalizeError(
            f'There is no picture "{name[:300]}" (looked for {_looked(places)}): write the name of a file.'
        )
    return found


def _places(name: str) -> list[Path]:
    path = Path(name.strip().strip("\"'")).expanduser()
    return [path] if path.is_absolute() else [Path(folder_paths.get_input_directory()) / path, EXAMPLES / path]


def _first(places: list[Path]) -> Path | None:
    """The first that is there."""
    for place in places:
        try:
            if place.is_dir() or place.is_file():
                return place
        except OSError:
            continue  # a name that no file system takes
    return None


def _looked(places: list[Path]) -> str:
    return " and ".join(str(place)[:300] for place in places)


def state_of(name: str | None) -> str:
    """Another text whenever a picture, or something in a folder of pictures, is another."""
    if not name or not name.strip():
        return ""
    try:
        found = _first(_places(name))
        if found is None:
            return name
        files = found.iterdir() if found.is_dir() else iter([found])
        return repr(sorted((path.name, path.stat().st_mtime_ns) for path in files))
    except OSError:
        return name
