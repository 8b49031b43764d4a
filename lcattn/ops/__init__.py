"""Attention mechanisms as pure functions on arrays, each choosing its implementation.

Every op has the same shape::

    op(q, k, v, <its own arrays>, *, causal=True, segment_ids=None, scale=None,
       <its own options>, implementation=None)

with queries `[B,T,N,H]`, keys and values `[B,S,K,H]` and `N % K == 0`. Sums and states are float32,
outputs have the dtype of the inputs, and `segment_ids` means: equal to running the documents apart.
"""

from lcattn.ops.agent_attention import (
    AgentAttentionState,
    agent_attention,
    agent_attention_state,
    pooled_agents,
)
from lcattn.ops.block_sparse_attention import (
    BlockPlan,
    PlanColumns,
    TransposedLists,
    block_mask_plan,
    block_sparse_attention,
    causal_plan,
    document_plan,
    sliding_window_plan,
    top_blocks_plan,
)
from lcattn.ops.core_context_attention import (
    CoreContextState,
    core_context_attention,
    core_context_attention_state,
)
from lcattn.ops.dispatch import UnsupportedImplementationError
from lcattn.ops.gated_delta_rule import gated_delta_rule
from lcattn.ops.gated_linear_attention import gated_linear_attention
from lcattn.ops.hyper_attention import hyper_attention
from lcattn.ops.linear_attention import (
    FeatureMap,
    LinearAttentionState,
    linear_attention,
    linear_attention_state,
    prefix_linear_attention,
)
from lcattn.ops.neural_memory import (
    NeuralMemoryState,
    neural_memory,
    neural_memory_state,
)
from lcattn.ops.ngram_attention import ngram_attention
from lcattn.ops.positions import alibi_slopes, rotary, segment_positions
from lcattn.ops.routing_attention import (
    RoutingAttentionState,
    routing_attention,
    routing_attention_state,
)
from lcattn.ops.selective_attention import selective_attention
from lcattn.ops.short_convolution import short_convolution
from lcattn.ops.softmax_attention import softmax_attention
from lcattn.ops.softplus_attention import softplus_attention

__all__ = [
    "AgentAttentionState",
    "BlockPlan",
    "CoreContextState",
    "FeatureMap",
    "LinearAttentionState",
    "NeuralMemoryState",
    "PlanColumns",
    "RoutingAttentionState",
    "TransposedLists",
    "UnsupportedImplementationError",
    "agent_attention",
    "agent_attention_state",
    "alibi_slopes",
    "block_mask_plan",
    "block_sparse_attention",
    "causal_plan",
    "core_context_attention",
    "core_context_attention_state",
    "document_plan",
    "gated_delta_rule",
    "gated_linear_attention",
    "hyper_attention",
    "linear_attention",
    "linear_attention_state",
    "neural_memory",
    "neural_memory_state",
    "ngram_attention",
    "pooled_agents",
    "prefix_linear_attention",
    "rotary",
    "routing_attention",
    "routing_attention_state",
    "segment_positions",
    "selective_attention",
    "short_convolution",
    "sliding_window_plan",
    "softmax_attention",
    "softplus_attention",
    "top_blocks_plan",
]
