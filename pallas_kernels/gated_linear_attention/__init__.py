"""Gated linear attention: kernels for Hopper GPUs."""

EVIDENCE = {
    "mosaic_gpu": ("interpreted", "lowered for CUDA", "run on an H200"),
}
