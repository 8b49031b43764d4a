"""Length-scaled softplus attention, with and without re-weighting (LSSA, LSSAR)."""

from lcattn.ops.softplus_attention.api import softplus_attention

__all__ = ["softplus_attention"]
