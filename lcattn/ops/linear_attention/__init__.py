"""Linear attention: a feature map in place of exp, a fixed-size state in place of a cache."""

from lcattn.ops.linear_attention.api import linear_attention
from lcattn.ops.linear_attention.features import FeatureMap
from lcattn.ops.linear_attention.prefix import prefix_linear_attention
from lcattn.ops.linear_attention.state import LinearAttentionState, linear_attention_state

__all__ = [
    "FeatureMap",
    "LinearAttentionState",
    "linear_attention",
    "linear_attention_state",
    "prefix_linear_attention",
]
