"""Titans neural memory: a network trained on each chunk of keys and values, as TPU kernels."""

EVIDENCE = {
    "mosaic_tpu": ("simulated", "lowered for TPU", "compiled for v5e, v6e and v5p"),
}
