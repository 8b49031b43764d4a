"""Gated linear attention: kernels for Hopper GPUs."""

EVIDENCE = ("interpreted", "lowered for CUDA", "run on an H200")
