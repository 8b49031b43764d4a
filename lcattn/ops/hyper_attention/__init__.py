"""HyperAttention: the alike keys found by hashing, the rest estimated from a sample."""

from lcattn.ops.hyper_attention.api import hyper_attention

__all__ = ["hyper_attention"]
