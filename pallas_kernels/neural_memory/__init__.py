"""Titans neural memory: a network trained on each chunk of keys and values."""

EVIDENCE = {
    "mosaic_gpu": ("interpreted", "lowered for CUDA", "run on an H200"),
    "mosaic_tpu": ("simulated", "lowered for TPU", "compiled for v5e, v6e and v5p"),
}
