"""Routing attention: tokens attend within clusters of similar content, learned by k-means."""

from lcattn.ops.routing_attention.api import routing_attention
from lcattn.ops.routing_attention.state import RoutingAttentionState, routing_attention_state

__all__ = ["RoutingAttentionState", "routing_attention", "routing_attention_state"]
