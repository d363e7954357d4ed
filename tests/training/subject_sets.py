"""Trainings of Subject-Diffusion on the pocket model."""

from finetuning import CHECKPOINT
from identity_sets import ENCODER
from pack.training.options import SubjectDiffusion
from pack.training.run import personalize
from pack.training.settings import make_settings


def settings_of_subjects(root, data, output, **values):
    common = {
        "pretrained_model_name_or_path": str(root / CHECKPOINT),
        "image_encoder": str(root / ENCODER),
        "instance_data_dir": str(data),
        "output_dir": str(output),
        "resolution": 80,
        "buckets": True,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "mixed_precision": "no",
        "augmentations": 1,
    }
    return make_settings(SubjectDiffusion, common | values)


def train_subjects(root, data, output, **values):
    """The files of a training."""
    return personalize("subject_diffusion", settings_of_subjects(root, data, output, **values))
