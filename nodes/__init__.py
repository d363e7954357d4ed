"""The nodes, a file a family. This folder is the only place that imports ComfyUI."""

from comfy_api.latest import ComfyExtension, io

from .folders import register_folders
from .ip_adapter import ApplyIPAdapter, LoadIPAdapter
from .references import EncodeReferences, LoadReferences, SaveReferences

NODES: list[type[io.ComfyNode]] = [
    LoadIPAdapter,
    EncodeReferences,
    SaveReferences,
    LoadReferences,
    ApplyIPAdapter,
]


class Personalize(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> Personalize:
    register_folders()
    return Personalize()
