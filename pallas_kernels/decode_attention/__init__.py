"""Decoding: one token over a long cache."""
