"""Causal length-scaled softplus attention (LSSA, LSSAR) as GPU kernels."""
