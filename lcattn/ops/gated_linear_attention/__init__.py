"""Linear attention with a state that forgets: retention, Mamba-2 and GLA are cases of it."""

from lcattn.ops.gated_linear_attention.api import gated_linear_attention

__all__ = ["gated_linear_attention"]
