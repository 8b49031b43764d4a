"""Measurements on models: what they compute in context, and how.

- `lcattn.probes.regression`: in-context learning as gradient descent.
"""
