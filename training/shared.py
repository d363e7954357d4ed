"""What training takes from models/: the one place that knows whether the pack is a package or the current folder."""

from pathlib import Path
from typing import TYPE_CHECKING

if not TYPE_CHECKING and __package__ == "training":
    from models.attention import decoupled_attention as decoupled_attention
    from models.base_models import TITLES as TITLES
    from models.base_models import family_of_widths as family_of_widths
    from models.base_models import fingerprint as fingerprint
    from models.base_models import title_of as title_of
    from models.checkpoints import overwrite_tensors as overwrite_tensors
    from models.checkpoints import read_header as read_header
    from models.delta import TEXT_MODELS as TEXT_MODELS
    from models.delta import check_budget as check_budget
    from models.delta import delta_tensors as delta_tensors
    from models.delta import host_text_tensors as host_text_tensors
    from models.delta import host_unet_names as host_unet_names
    from models.delta import truncated_delta_tensors as truncated_delta_tensors
    from models.errors import PersonalizeError as PersonalizeError
    from models.ip_adapter import ImagePrompt as ImagePrompt
    from models.ip_adapter import IPAdapter as IPAdapter
    from models.ip_adapter import read_ip_adapter as read_ip_adapter
    from models.ip_adapter import stack_prompts as stack_prompts
    from models.lora import UNET as UNET
    from models.lora import check_lora as check_lora
    from models.lora import host_layers as host_layers
    from models.lora import lora_tensors as lora_tensors
    from models.lora import text_prefixes as text_prefixes
    from models.losses import denoising_losses as denoising_losses
    from models.losses import min_snr_weights as min_snr_weights
    from models.losses import offset_noise as offset_noise
    from models.losses import prior_preservation_loss as prior_preservation_loss
    from models.metadata import About as About
    from models.pictures import CLIP_MEAN as CLIP_MEAN
    from models.pictures import CLIP_STD as CLIP_STD
    from models.pictures import MASK_ENDING as MASK_ENDING
    from models.pictures import SUFFIXES as SUFFIXES
    from models.pictures import cover_picture as cover_picture
    from models.pictures import frame_picture as frame_picture
    from models.pictures import list_pictures as list_pictures
    from models.pictures import read_picture as read_picture
    from models.projection import LinearProjection as LinearProjection
    from models.projection import Resampler as Resampler
    from models.references import References as References
    from models.text_keys import PREFIXES as PREFIXES
    from models.text_keys import text_tensors as text_tensors
    from models.text_keys import with_text_model as with_text_model
    from models.textual_inversion import LearnedWord as LearnedWord
    from models.textual_inversion import read_word as read_word
    from models.textual_inversion import word_tensors as word_tensors
    from models.unet_keys import single_file_names as single_file_names
    from models.vae_keys import tiny_vae_tensors as tiny_vae_tensors
    from models.vae_keys import vae_tensors as vae_tensors
    from models.weight_files import VISION_CONFIG as VISION_CONFIG
    from models.weight_files import read_safetensors as read_safetensors
    from models.weight_files import read_weights as read_weights
    from models.weight_files import write_safetensors as write_safetensors
else:
    from ..models.attention import decoupled_attention as decoupled_attention
    from ..models.base_models import TITLES as TITLES
    from ..models.base_models import family_of_widths as family_of_widths
    from ..models.base_models import fingerprint as fingerprint
    from ..models.base_models import title_of as title_of
    from ..models.checkpoints import overwrite_tensors as overwrite_tensors
    from ..models.checkpoints import read_header as read_header
    from ..models.delta import TEXT_MODELS as TEXT_MODELS
    from ..models.delta import check_budget as check_budget
    from ..models.delta import delta_tensors as delta_tensors
    from ..models.delta import host_text_tensors as host_text_tensors
    from ..models.delta import host_unet_names as host_unet_names
    from ..models.delta import truncated_delta_tensors as truncated_delta_tensors
    from ..models.errors import PersonalizeError as PersonalizeError
    from ..models.ip_adapter import ImagePrompt as ImagePrompt
    from ..models.ip_adapter import IPAdapter as IPAdapter
    from ..models.ip_adapter import read_ip_adapter as read_ip_adapter
    from ..models.ip_adapter import stack_prompts as stack_prompts
    from ..models.lora import UNET as UNET
    from ..models.lora import check_lora as check_lora
    from ..models.lora import host_layers as host_layers
    from ..models.lora import lora_tensors as lora_tensors
    from ..models.lora import text_prefixes as text_prefixes
    from ..models.losses import denoising_losses as denoising_losses
    from ..models.losses import min_snr_weights as min_snr_weights
    from ..models.losses import offset_noise as offset_noise
    from ..models.losses import prior_preservation_loss as prior_preservation_loss
    from ..models.metadata import About as About
    from ..models.pictures import CLIP_MEAN as CLIP_MEAN
    from ..models.pictures import CLIP_STD as CLIP_STD
    from ..models.pictures import MASK_ENDING as MASK_ENDING
    from ..models.pictures import SUFFIXES as SUFFIXES
    from ..models.pictures import cover_picture as cover_picture
    from ..models.pictures import frame_picture as frame_picture
    from ..models.pictures import list_pictures as list_pictures
    from ..models.pictures import read_picture as read_picture
    from ..models.projection import LinearProjection as LinearProjection
    from ..models.projection import Resampler as Resampler
    from ..models.references import References as References
    from ..models.text_keys import PREFIXES as PREFIXES
    from ..models.text_keys import text_tensors as text_tensors
    from ..models.text_keys import with_text_model as with_text_model
    from ..models.textual_inversion import LearnedWord as LearnedWord
    from ..models.textual_inversion import read_word as read_word
    from ..models.textual_inversion import word_tensors as word_tensors
    from ..models.unet_keys import single_file_names as single_file_names
    from ..models.vae_keys import tiny_vae_tensors as tiny_vae_tensors
    from ..models.vae_keys import vae_tensors as vae_tensors
    from ..models.weight_files import VISION_CONFIG as VISION_CONFIG
    from ..models.weight_files import read_safetensors as read_safetensors
    from ..models.weight_files import read_weights as read_weights
    from ..models.weight_files import write_safetensors as write_safetensors

ROOT = Path(__file__).resolve().parent.parent
POCKET = ROOT / "models" / "pocket"
"""The pocket model's files, which come with the pack."""
