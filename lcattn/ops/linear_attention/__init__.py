"""Linear attention: a feature map in place of exp, a fixed-size state in place of a cache."""

from lcattn.ops.linear_attention.api import linear_attention, linear_attention_state
from lcattn.ops.linear_attention.features import FeatureMap
from lcattn.ops.linear_attention.state import LinearAttentionState

__all__ = ["FeatureMap", "LinearAttentionState", "linear_attention", "linear_attention_state"]
