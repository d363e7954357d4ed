"""The methods' mathematics and their files, in plain torch: no ComfyUI, no diffusers."""
