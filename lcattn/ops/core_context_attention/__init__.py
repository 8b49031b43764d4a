"""Core context aware attention (CCA): far groups of tokens are read as one core token each."""

from lcattn.ops.core_context_attention.api import core_context_attention
from lcattn.ops.core_context_attention.state import (
    CoreContextState,
    core_context_attention_state,
)

__all__ = ["CoreContextState", "core_context_attention", "core_context_attention_state"]
