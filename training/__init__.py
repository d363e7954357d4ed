"""Headless: python -m training.<method>. Never imports ComfyUI or the nodes."""
