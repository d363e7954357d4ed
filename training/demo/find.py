"""Find the ComfyUI of this machine. Standard library only: set-up runs this before anything is installed."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""


def find_comfyui() -> Path | None:
    """COMFYUI_PATH; the ComfyUI whose custom_nodes holds this repository; ~/ComfyUI; None where there is none."""
    named = os.environ.get("COMFYUI_PATH")
    places = [Path.home() / "ComfyUI"]
    if ROOT.parent.name == "custom_nodes":
        places.insert(0, ROOT.parent.parent)
    if named:
        places.insert(0, Path(named).expanduser())
        if not (places[0] / "main.py").is_file():
            print(f"There is no ComfyUI in COMFYUI_PATH={named}; looking elsewhere.", file=sys.stderr)
    return next((place.resolve() for place in places if (place / "main.py").is_file()), None)


def comfyui_version(comfyui: Path) -> str:
    """Its version, read from its files."""
    text = (comfyui / "comfyui_version.py").read_text()
    found = re.search(r'__version__ = "([^"]+)"', text)
    return found[1] if found else "of an unknown version"
