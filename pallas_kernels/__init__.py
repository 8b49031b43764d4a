"""Pallas kernels on arrays, one folder an op; they know nothing of `lcattn`.

Importable on a machine with neither a GPU nor a TPU. `EVIDENCE` of each says on what its code was
tried, by backend. Tests do it again with the code as it is, but for runs on a GPU: whether such a
run was of this very code, its record says (`source`), and the README with it.
"""
