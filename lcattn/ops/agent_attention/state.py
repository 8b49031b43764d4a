"""What causal agent attention remembers: for each agent, what it has read so far."""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lcattn.typing import Array, Float


@no_type_check  # JAX also fills it with shapes and specs
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AgentAttentionState:
    """n (H + 2) numbers a head, in float32, whatever the length.

    Attributes:
      values: each agent's softmax-weighted mean of the values so far, `[B,N,n,H]`.
      highest: the largest score of a key so far, `[B,N,n]`; -inf before the first. No gradient
        flows through it, since it cancels.
      total: the sum of exp(score - highest) over the keys so far, `[B,N,n]`.
    """

    values: Float[Array, "B N n H"]
    highest: Float[Array, "B N n"]
    total: Float[Array, "B N n"]


def agent_attention_state(
    batch_size: int,
    num_heads: int,
    num_agents: int,
    value_size: int,
    *,
    dtype: DTypeLike = jnp.float32,
) -> AgentAttentionState:
    """The state before the first token.

    Args:
      batch_size: B.
      num_heads: N.
      num_agents: n.
      value_size: H.
      dtype: float32, or float64 for float64 inputs.
    """
    values = jnp.zeros((batch_size, num_heads, num_agents, value_size), dtype)
    total = values[..., 0]
    return AgentAttentionState(values, jnp.full_like(total, -jnp.inf), total)
