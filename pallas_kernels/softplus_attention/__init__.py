"""Causal length-scaled softplus attention (LSSA, LSSAR) as GPU kernels."""

EVIDENCE = {
    "mosaic_gpu": ("interpreted", "lowered for CUDA", "run on an H200"),
}
