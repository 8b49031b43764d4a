"""Pallas kernels on arrays, one folder an op; they know nothing of `lcattn`.

Importable on a machine with neither a GPU nor a TPU.
"""
