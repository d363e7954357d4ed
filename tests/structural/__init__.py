"""Structural models for tests. As a ComfyUI pack, it registers the miniature; imported by tests, it waits."""

from .checkpoints import register

NODE_CLASS_MAPPINGS: dict[str, type] = {}

if __name__ != "structural":
    register()
