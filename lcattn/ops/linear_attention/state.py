"""The state of linear attention, and the form in which plain loops carry it."""

import dataclasses
from collections.abc import Callable
from typing import no_type_check

import jax
import jax.numpy as jnp

from lcattn.typing import Array, Float


@no_type_check  # JAX also fills it with shapes and specs
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearAttentionState:
    """What linear attention remembers of the past: a sum over keys, in float32.

    Attributes:
      kv: sum of phi(k) vᵀ, `[B,K,D,H]` with D features.
      normalizer: sum of phi(k), `[B,K,D]`; None where outputs are not normalised.
    """

    kv: Float[Array, "B K D H"]
    normalizer: Float[Array, "B K D"] | None


def with_normalizer_as_value(attend: Callable) -> Callable:
    """An implementation that divides by the sum of weights, from one that only sums values.

    The normaliser is one more value that every token has: 1. So it is the last column of kv.
    """

    def run(similarity, q, k, v, segment_ids, state, *, normalize: bool, **options):
        if state is not None:
            columns = (
                [state.kv] if state.normalizer is None else [state.kv, state.normalizer[..., None]]
            )
            state = jnp.concatenate(columns, axis=-1)
        if normalize:
            v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        out, state = attend(similarity, q, k, v, segment_ids, state, **options)
        if not normalize:
            return out, LinearAttentionState(kv=state, normalizer=None)
        total = out[..., -1:]
        out = jnp.where(total == 0, 0, out[..., :-1] / jnp.where(total == 0, 1, total))
        return out, LinearAttentionState(kv=state[..., :-1], normalizer=state[..., -1])

    return run
