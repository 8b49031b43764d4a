"""Causal linear attention as GPU kernels."""

EVIDENCE = ("interpreted", "lowered for CUDA", "run on an H200")
