"""Gated linear attention: kernels for Hopper GPUs and TPUs."""

EVIDENCE = {
    "mosaic_gpu": ("interpreted", "lowered for CUDA", "run on an H200"),
    "mosaic_tpu": ("simulated", "lowered for TPU", "compiled for v5e, v6e and v5p"),
}
