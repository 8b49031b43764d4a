"""Which query sees which key: every key is seen from one position on, until another.

Causality, sliding windows, packed documents and keys that give way to a summary of them all have
this form, so one mask and one walk over blocks (`lcattn.ops.blocks`) serve them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcattn.ops.segments import document_bounds
from lcattn.typing import Array, Bool, Int

ALWAYS = jnp.iinfo(jnp.int32).min
"""The begin of a key that every query sees."""

NEVER = jnp.iinfo(jnp.int32).max
"""The end of a key that no later query loses sight of."""

HIDDEN = -1
"""The position of a query that sees nothing, where keys begin at 0 or later."""


class Visibility(NamedTuple):
    """A query at position p sees the keys with `begin <= p < end`.

    The leading axis b is B, or 1 where all rows are alike; a rule of each head has one axis more.

    In plans of blocks a key may end before it begins. Then it is hidden from the queries with
    `end <= p < begin` and seen by all others, as if positions lay on a circle.
    """

    queries: Int[Array, "b T"]
    begin: Int[Array, "b S"]
    end: Int[Array, "b S"]

    def mask(self) -> Bool[Array, "*b T S"]:
        """True where query t sees key s."""
        return sees(self.queries[..., :, None], self.begin[..., None, :], self.end[..., None, :])

    def num_keys(self) -> Int[Array, "b T"]:
        """Number of keys that each query sees, without T·S memory.

        Queries are at T consecutive positions or `HIDDEN`, so counting by position does it; sorting
        edges takes a GPU many small kernels, and a compiler long.
        """
        T = self.queries.shape[1]
        if T == 1:
            return self.mask().sum(axis=-1, dtype=jnp.int32)
        first = self.queries.max(axis=1, keepdims=True) - (T - 1)

        def place(positions: Array) -> Array:
            """0 for all positions before `first`, T + 1 for all after the last query."""
            return jnp.clip(positions, first - 1, first + T) - (first - 1)

        def passed(edges: Array) -> Array:
            count = jax.vmap(lambda places: jnp.zeros(T + 2, jnp.int32).at[places].add(1))
            up_to = jnp.cumsum(count(place(edges)), axis=1)
            return jnp.take_along_axis(up_to, place(self.queries), axis=1)

        # A key that is never seen begins and ends at one position, and cancels.
        return passed(self.begin) - passed(self.end)


def sees(position: Array, begin: Array, end: Array) -> Array:
    """Whether queries at these positions see keys with these bounds, around the circle of int32."""
    return (position - begin).astype(jnp.uint32) < (end - begin).astype(jnp.uint32)


def visibility(
    num_queries: int,
    num_keys: int,
    *,
    causal: bool,
    window: int | None = None,
    sinks: int = 0,
    segment_ids: Int[Array, "B T"] | None = None,
    query_position: Int[Array, ""] | int = 0,
    key_position: Int[Array, ""] | int = 0,
) -> Visibility:
    """The visibility of T consecutive queries and S consecutive keys.

    `window` counts the keys seen, the query's own included. `causal=True, window=2`::

             key 0 1 2 3
        query 0  x . . .
        query 1  x x . .
        query 2  . x x .
        query 3  . . x x

    The first `sinks` keys of a document stay in sight when the window has passed them. Keys at
    negative positions do not exist: a cache that is not yet full ends with the newest key. With
    `segment_ids` queries and keys are the same tokens, at positions 0 to T-1.
    """
    keys = (key_position + jnp.arange(num_keys, dtype=jnp.int32))[None]
    if segment_ids is None:
        queries = (query_position + jnp.arange(num_queries, dtype=jnp.int32))[None]
        begin = keys if causal else jnp.full_like(keys, ALWAYS)
        end = jnp.full_like(keys, NEVER)
        exists = keys >= 0
        first = jnp.zeros_like(keys)
    else:
        exists = segment_ids >= 0
        queries = jnp.where(exists, keys, HIDDEN)
        first, end = document_bounds(segment_ids)
        begin = jnp.broadcast_to(keys, first.shape) if causal else first
    if window is not None:
        end = jnp.where(keys - first < sinks, end, jnp.minimum(end, keys + window))
    return Visibility(queries, begin, jnp.where(exists, end, begin))
