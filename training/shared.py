"""What training takes from models/: the one place that knows whether the pack is a package or the current folder."""

from pathlib import Path
from typing import TYPE_CHECKING

if not TYPE_CHECKING and __package__ == "training":
    from models.attention import decoupled_attention as decoupled_attention
    from models.errors import PersonalizeError as PersonalizeError
    from models.ip_adapter import ImagePrompt as ImagePrompt
    from models.ip_adapter import IPAdapter as IPAdapter
    from models.ip_adapter import read_ip_adapter as read_ip_adapter
    from models.ip_adapter import stack_prompts as stack_prompts
    from models.pictures import CLIP_MEAN as CLIP_MEAN
    from models.pictures import CLIP_STD as CLIP_STD
    from models.pictures import frame_picture as frame_picture
    from models.pictures import list_pictures as list_pictures
    from models.pictures import read_picture as read_picture
    from models.projection import LinearProjection as LinearProjection
    from models.projection import Resampler as Resampler
    from models.references import References as References
    from models.unet_keys import single_file_names as single_file_names
    from models.weight_files import VISION_CONFIG as VISION_CONFIG
    from models.weight_files import read_safetensors as read_safetensors
    from models.weight_files import write_safetensors as write_safetensors
else:
    from ..models.attention import decoupled_attention as decoupled_attention
    from ..models.errors import PersonalizeError as PersonalizeError
    from ..models.ip_adapter import ImagePrompt as ImagePrompt
    from ..models.ip_adapter import IPAdapter as IPAdapter
    from ..models.ip_adapter import read_ip_adapter as read_ip_adapter
    from ..models.ip_adapter import stack_prompts as stack_prompts
    from ..models.pictures import CLIP_MEAN as CLIP_MEAN
    from ..models.pictures import CLIP_STD as CLIP_STD
    from ..models.pictures import frame_picture as frame_picture
    from ..models.pictures import list_pictures as list_pictures
    from ..models.pictures import read_picture as read_picture
    from ..models.projection import LinearProjection as LinearProjection
    from ..models.projection import Resampler as Resampler
    from ..models.references import References as References
    from ..models.unet_keys import single_file_names as single_file_names
    from ..models.weight_files import VISION_CONFIG as VISION_CONFIG
    from ..models.weight_files import read_safetensors as read_safetensors
    from ..models.weight_files import write_safetensors as write_safetensors

ROOT = Path(__file__).resolve().parent.parent
POCKET = ROOT / "models" / "pocket"
"""The pocket model's files, which come with the pack."""
