"""Short trainings on the pocket model, for the tests."""

import json
import os
import subprocess
import sys

from identity_sets import ADAPTER, CHECKPOINT, ENCODER, identities
from pack.training.pocket.photos import write_photos
from pack.training.pocket.subject_set import write_subjects
from pack.training.run import METHODS, personalize
from pack.training.settings import make_settings


def photos(folder, count=5, captions=False):
    """Pictures of one held-out subject."""
    for path in write_photos(folder, 3, count):
        if not captions:
            path.with_suffix(".txt").unlink()
    return folder


def material(method, folder):
    """What a method trains on: photographs, folders of identities, or a data set of subjects."""
    if method == "subject_diffusion":
        write_subjects(folder, 0, 5)
        return folder
    return identities(folder) if method == "ip_adapter" else photos(folder)


def settings_of(method, root, folder, output, **values):
    """Settings for a few steps."""
    common = {
        "pretrained_model_name_or_path": str(root / CHECKPOINT),
        "instance_data_dir": str(folder),
        "output_dir": str(output),
        "class_name": "woman",
        "max_train_steps": 3,
        "save_precision": "fp32",
    }
    return make_settings(METHODS[method][0], common | values)


def train(method, root, folder, output, **values):
    """Train in this process; returns the files."""
    return personalize(method, settings_of(method, root, folder, output, **values))


def command(method, root, folder, output, *options):
    """The same as a user runs it."""
    return [
        sys.executable,
        "-m",
        f"training.{method}",
        "--pretrained_model_name_or_path",
        str(root / CHECKPOINT),
        "--instance_data_dir",
        str(folder),
        "--output_dir",
        str(output),
        "--class_name",
        "woman",
        *(["--ip_adapter", str(root / ADAPTER)] if method == "ip_adapter" else []),
        *(["--image_encoder", str(root / ENCODER)] if method in ("ip_adapter", "subject_diffusion") else []),
        *options,
    ]


def run(root, *arguments, timeout=300):
    """Run to the end."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(arguments, cwd=root, capture_output=True, text=True, timeout=timeout, env=environment)


def losses_of(output):
    """The loss of each step that was logged."""
    lines = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]
