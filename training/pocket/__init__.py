"""Pocket portraits: a trained miniature of Stable Diffusion, its generator of pictures, and its judge."""
