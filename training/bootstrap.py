"""Set up and run on a fresh machine: python -m training.bootstrap demo|test [arguments].

Makes .venv, installs what is needed (with the requirements of the ComfyUI found, if any), and runs the demo or the
tests in it. Standard library only. What is installed already is kept, so that a second run starts at once.
"""

from __future__ import annotations  # so that an old Python reaches the sentence about its version

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from .demo.find import ROOT, comfyui_version, find_comfyui

VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
STAMP = VENV / "installed.txt"
WORKERS = 2
# These fit each other. Not the newest of each: torchaudio's releases neither require the torch that they are built for
# nor carry its number (2.11.1 does not load with torch 2.11), and ComfyUI does not start where the two differ.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")


def run(*command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> int:
    """Run a command with its output shown, with more in its environment; returns its exit status."""
    return subprocess.run([str(part) for part in command], cwd=cwd, env={**os.environ, **(env or {})}).returncode


def pip(*arguments: str | Path) -> None:
    if run(PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "-q", *arguments):
        raise SystemExit(f"Installing {' '.join(map(str, arguments))} failed; see above.")


def install_torch() -> None:
    """torch, torchvision and torchaudio that fit each other; those that are there already and load are kept."""
    command = [str(PYTHON), "-c", "import torch, torchvision, torchaudio"]
    if subprocess.run(command, capture_output=True).returncode:
        pip(*TORCH)


def set_up(comfyui: Path | None) -> None:
    """Make .venv ready for this repository and for the ComfyUI found."""
    requirements = [ROOT / "requirements.txt", ROOT / "tests" / "requirements.txt"]
    if comfyui is not None:
        requirements.append(comfyui / "requirements.txt")
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in [*requirements, Path(__file__)])).hexdigest()
    if PYTHON.exists() and STAMP.exists() and STAMP.read_text() == wanted:
        return
    if not PYTHON.exists():
        print(f"Making {VENV} ...", flush=True)
        venv.create(VENV, with_pip=True)
    print("Installing what is needed (some minutes the first time) ...", flush=True)
    install_torch()
    pip(*(argument for path in requirements for argument in ("-r", path)))
    STAMP.write_text(wanted)


def check_types() -> int:
    """mypy on the pack as a package of its own name, which a checkout's folder need not have."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("nodes", "models", "training"):
            shutil.copytree(ROOT / part, Path(folder) / "pack" / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "__init__.py", Path(folder) / "pack")
        cache = ROOT / ".mypy_cache"
        settings = ("--config-file", ROOT / "pyproject.toml", "--cache-dir", cache)
        return run(PYTHON, "-m", "mypy", *settings, "-p", "pack", cwd=Path(folder))


def workers(cores: int) -> tuple[list[str], dict[str, str]]:
    """How two processes share the tests where there are cores for them: pytest's options, and the environment.

    A file is for one process, and each goes through its files in the usual order, so that a file never follows one that
    it would not follow otherwise. Cores are shared evenly.
    """
    if cores < WORKERS:
        return [], {}
    options = ["-n", str(WORKERS), "--dist", "loadfile", "--no-loadscope-reorder"]
    return options, {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores // WORKERS))}


def test(arguments: list[str]) -> int:
    """Style, types, tests; all of them run, and any failure is a failure."""
    options, env = workers(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    failures = [
        run(BIN / "ruff", "check", "."),
        run(BIN / "ruff", "format", "--check", "."),
        check_types(),
        run(BIN / "pytest", *options, *arguments, env=env),
    ]
    return int(any(failures))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m training.bootstrap", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("demo", "test"))
    what, rest = parser.parse_known_args()
    if sys.version_info < (3, 11):  # noqa: UP036
        raise SystemExit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}.")
    comfyui = find_comfyui()
    if comfyui is None:
        print("No ComfyUI found (COMFYUI_PATH, the custom_nodes around this folder, ~/ComfyUI): going on without.")
    else:
        print(f"ComfyUI {comfyui_version(comfyui)} in {comfyui}")
    set_up(comfyui)
    sys.stdout.flush()
    if what.what == "test":
        return test(rest)
    return run(PYTHON, "-m", "training.demo", *rest)


if __name__ == "__main__":
    raise SystemExit(main())
