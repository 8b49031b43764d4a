"""Attention mechanisms as pure functions on arrays, each choosing its implementation.

Every op has the same shape::

    op(q, k, v, <its own arrays>, *, causal=True, segment_ids=None, scale=None,
       <its own options>, implementation=None)

with queries `[B,T,N,H]`, keys and values `[B,S,K,H]` and `N % K == 0`. Sums and states are float32,
outputs have the dtype of the inputs, and `segment_ids` means: equal to running the documents apart.
"""

from lcattn.ops.dispatch import UnsupportedImplementationError
from lcattn.ops.gated_delta_rule import gated_delta_rule
from lcattn.ops.gated_linear_attention import gated_linear_attention
from lcattn.ops.linear_attention import (
    FeatureMap,
    LinearAttentionState,
    linear_attention,
    linear_attention_state,
    prefix_linear_attention,
)
from lcattn.ops.positions import alibi_slopes, rotary, segment_positions
from lcattn.ops.short_convolution import short_convolution
from lcattn.ops.softmax_attention import softmax_attention

__all__ = [
    "FeatureMap",
    "LinearAttentionState",
    "UnsupportedImplementationError",
    "alibi_slopes",
    "gated_delta_rule",
    "gated_linear_attention",
    "linear_attention",
    "linear_attention_state",
    "prefix_linear_attention",
    "rotary",
    "segment_positions",
    "short_convolution",
    "softmax_attention",
]
