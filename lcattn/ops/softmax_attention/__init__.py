"""Exact softmax attention, the yardstick of every other mechanism."""

from lcattn.ops.softmax_attention.api import softmax_attention

__all__ = ["softmax_attention"]
