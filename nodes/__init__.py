"""The nodes, a file a family. This folder is the only place that imports ComfyUI."""

from comfy_api.latest import ComfyExtension, io

from .attend_and_excite import AttendAndExcite
from .attention_maps import RecordAttentionMaps, ShowAttentionMaps
from .composable_diffusion import ComposeConcepts, ComposePrompt
from .contact_sheet import ContactSheet
from .custom_diffusion import LoadCustomDiffusion, MergeCustomDiffusion
from .folders import register_folders
from .image_encoder import LoadImageEncoder
from .ip_adapter import ApplyIPAdapter, LoadIPAdapter
from .personalization import LoadDreamBooth, LoadLora, LoadPersonalization, LoadTextualInversion
from .pocket import register_pocket
from .reference_attention import ShowReferenceAttention
from .references import EncodeReferences, LoadReferences, SaveReferences
from .scores import ScoreImages
from .subject_diffusion import ApplySubjectDiffusion, GuideSubjects, LoadSubjectDiffusion
from .subjects import Subject
from .training import TrainDreamBooth, TrainLora, TrainTextualInversion

NODES: list[type[io.ComfyNode]] = [
    LoadImageEncoder,
    LoadIPAdapter,
    EncodeReferences,
    SaveReferences,
    LoadReferences,
    ApplyIPAdapter,
    ShowReferenceAttention,
    AttendAndExcite,
    RecordAttentionMaps,
    ShowAttentionMaps,
    ComposePrompt,
    ComposeConcepts,
    LoadLora,
    LoadTextualInversion,
    LoadDreamBooth,
    LoadCustomDiffusion,
    MergeCustomDiffusion,
    LoadSubjectDiffusion,
    Subject,
    ApplySubjectDiffusion,
    GuideSubjects,
    LoadPersonalization,
    TrainLora,
    TrainTextualInversion,
    TrainDreamBooth,
    ScoreImages,
    ContactSheet,
]


class Personalize(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> Personalize:
    register_folders()
    register_pocket()
    return Personalize()
