"""Causal linear attention as GPU kernels."""
