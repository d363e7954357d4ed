"""Where the files lie: model folders in ComfyUI's registry, and folders of pictures."""

from pathlib import Path

import folder_paths

from ..models.errors import PersonalizeError

PACK = Path(__file__).resolve().parent.parent
EXAMPLES = PACK / "workflows"


def register_folders() -> None:
    """Add our folders to the registry. Folders that others or extra_model_paths.yaml have added stay."""
    _register("ipadapter", Path(folder_paths.models_dir) / "ipadapter", set(folder_paths.supported_pt_extensions))
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


def find_pictures(name: str) -> Path:
    """A folder of pictures: an absolute path, a folder in ComfyUI's input folder, or one of the pack's examples."""
    places = [Path(folder_paths.get_input_directory()) / name, EXAMPLES / name]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        looked = " and ".join(str(place) for place in places) if not Path(name).is_absolute() else name
        raise PersonalizeError(f'There is no folder "{name}" (looked for {looked}): write a folder with pictures.')
    return found
