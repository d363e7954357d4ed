"""Folders of identities of the pocket generator, and what trains on them."""

from pack.training.pocket.photos import write_identities
from pack.training.run import METHODS, personalize
from pack.training.settings import make_settings

POCKET = "models/pocket"
CHECKPOINT = f"{POCKET}/checkpoints/pocket_portraits.safetensors"
ENCODER = f"{POCKET}/clip_vision/pocket_portraits_vision.safetensors"
ADAPTER = f"{POCKET}/ipadapter/pocket_portraits_ip_adapter.safetensors"


def identities(folder, count=3, pictures=4):
    """A folder each."""
    write_identities(folder, 5000, count, pictures)
    return folder


def settings_of(root, folder, output, **values):
    """Settings for a few steps; a value of None leaves an option out."""
    common = {
        "pretrained_model_name_or_path": str(root / CHECKPOINT),
        "image_encoder": str(root / ENCODER),
        "ip_adapter": str(root / ADAPTER),
        "instance_data_dir": str(folder),
        "output_dir": str(output),
        "max_train_steps": 3,
        "train_batch_size": 2,
        "save_precision": "fp32",
    }
    wanted = {name: value for name, value in (common | values).items() if value is not None}
    return make_settings(METHODS["ip_adapter"][0], wanted)


def train(root, folder, output, **values):
    """Train in this process; returns the file, or None if it was stopped."""
    stop = values.pop("stop", None)
    return next(iter(personalize("ip_adapter", settings_of(root, folder, output, **values), stop)), None)
