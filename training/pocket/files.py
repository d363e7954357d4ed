"""Where the shipped files lie in the pocket model's folder, models/pocket."""

from pathlib import Path

CHECKPOINT = Path("checkpoints") / "pocket_portraits.safetensors"
IMAGE_ENCODER = Path("clip_vision") / "pocket_portraits_vision.safetensors"
ADAPTER = Path("ipadapter") / "pocket_portraits_ip_adapter.safetensors"
SUBJECTS = Path("subject_diffusion") / "pocket_subject_diffusion.safetensors"
JUDGE = Path("pocket_portraits_judge.safetensors")
