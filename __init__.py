"""Personalize: pictures of your person, pet, product or logo in ComfyUI, from a few photographs."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./nodes/web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
