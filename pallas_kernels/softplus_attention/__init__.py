"""Causal length-scaled softplus attention (LSSA, LSSAR) as GPU kernels."""

EVIDENCE = ("interpreted", "lowered for CUDA", "run on an H200")
