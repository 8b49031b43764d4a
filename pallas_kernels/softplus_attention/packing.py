"""Packed documents, and which blocks of tokens see which."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Packing(NamedTuple):
    """Packed documents: a query at position p sees key j where `j <= p < end_j`.

    Attributes:
      positions: p of each query, `[B,T]`: its index, or -1 if it sees nothing.
      ends: of each key, `[B,T]`.
      first_keys: the first key that a block of queries may see, `[B,blocks]`.
      past_queries: past the last query that may see a block of keys, `[B,blocks]`.
    """

    positions: jax.Array
    ends: jax.Array
    first_keys: jax.Array
    past_queries: jax.Array


def pack(positions: jax.Array, ends: jax.Array, block: int) -> Packing:
    """Packed documents in blocks of tokens, from positions and ends in int32.

    Ends never decrease but for keys that nothing sees.
    """
    blocks = ends.reshape(ends.shape[0], -1, block).max(axis=2)
    starts = jnp.arange(blocks.shape[1], dtype=jnp.int32) * block
    search = jax.vmap(lambda e: jnp.searchsorted(e, starts, side="right"))
    first = jnp.minimum(search(lax.cummax(ends, axis=1)).astype(jnp.int32), starts)
    return Packing(positions, ends, first, jnp.maximum(blocks, starts + 1))
