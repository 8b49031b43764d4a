"""Which key a query sees, and the score that its distance adds."""

import jax.numpy as jnp

from lcattn.typing import Array, Bool, Float, Int


def visible(
    query_positions: Int[Array, "T"],
    key_positions: Int[Array, "S"],
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None,
    *,
    causal: bool,
    window: int | None,
) -> Bool[Array, "b T S"]:
    """True where query t sees key s; `b` is 1 without segments (ids of queries and of keys).

    `window` counts the keys seen, the query's own included. `causal=True, window=2`::

             key 0 1 2 3
        query 0  x . . .
        query 1  x x . .
        query 2  . x x .
        query 3  . . x x

    Keys at negative positions do not exist: a cache that is not yet full ends with the newest key.
    """
    distance = query_positions[:, None] - key_positions[None, :]
    seen = jnp.broadcast_to(key_positions[None, :] >= 0, distance.shape)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance < window
    seen = seen[None]
    if segments is not None:
        of_queries, of_keys = segments[0][:, :, None], segments[1][:, None, :]
        seen = seen & (of_queries == of_keys) & (of_keys >= 0)
    return seen


def distance_bias(
    slopes: Float[Array, "N"], query_positions: Int[Array, "T"], key_positions: Int[Array, "S"]
) -> Float[Array, "N T S"]:
    """ALiBi: `-slope * |t - s|`, built in float32 because bfloat16 cannot count past 256."""
    distance = jnp.abs(query_positions[:, None] - key_positions[None, :])
    return -slopes[:, None, None] * distance.astype(slopes.dtype)
