"""Gated linear attention: kernels for Hopper GPUs."""
