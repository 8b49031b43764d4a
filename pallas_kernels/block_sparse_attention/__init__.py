"""Softmax attention over lists of blocks of keys, as TPU kernels."""

EVIDENCE = {
    "mosaic_tpu": ("simulated", "lowered for TPU", "compiled for v5e, v6e and v5p"),
}
