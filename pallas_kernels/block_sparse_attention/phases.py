"""Lists of blocks in the order in which the Hopper kernels walk them.

What a block that stays walks past comes in two phases: first the blocks all of whose pairs count,
then those whose pairs are tested. So the kernels have two loops and ask nothing of an entry but
where it lies.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.items import (
    FULL,
    PARTIAL,
    SKIPPED,
    Lists,
    powers_of_two,
)


class Phases(NamedTuple):
    """Entries `[b,h,L]`, those of one block that stays side by side.

    Attributes:
      blocks: the block that streams.
      edges: where the whole entries of each block that stays begin, where its partial ones do, and
        where these end, `[b,h,blocks,3]`.
      order: the blocks that stay, those of the longest lists first, `[b,h,blocks]`.
      log_weight: what is added to scores in powers of two, float32, or None.
    """

    blocks: jax.Array
    edges: jax.Array
    order: jax.Array
    log_weight: jax.Array | None


def by_queries(lists: Lists) -> Phases:
    """Blocks of queries stay: each list is sorted where it is."""
    b, h, m, e = lists.kinds.shape
    order = jnp.argsort(-lists.kinds, axis=-1, stable=True)

    def ordered(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, order, axis=-1).reshape(b, h, -1)

    begin = jnp.broadcast_to(e * jnp.arange(m, dtype=jnp.int32), (b, h, m))
    whole, listed = (
        jnp.sum(lists.kinds >= kind, axis=-1, dtype=jnp.int32) for kind in (FULL, PARTIAL)
    )
    return _phases(ordered, lists.blocks, [begin, begin + whole, begin + listed], lists.log_weight)


def by_keys(lists: Lists) -> Phases:
    """Blocks of keys stay: entries are sorted by these."""
    b, h, m, e = lists.kinds.shape
    n = lists.start.shape[-1] - 1
    key = jnp.where(lists.kinds == SKIPPED, 2 * n, 2 * lists.blocks + (lists.kinds != FULL))
    key = key.reshape(b, h, -1).astype(jnp.int32)
    order = jnp.argsort(key, axis=-1, stable=True)

    def ordered(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x.reshape(b, h, -1), order, axis=-1)

    phase = jnp.arange(2 * n + 1, dtype=jnp.int32)
    begin = jax.vmap(jax.vmap(lambda x: jnp.searchsorted(x, phase)))(ordered(key))
    readers = jnp.broadcast_to(jnp.arange(m, dtype=jnp.int32)[:, None], (b, h, m, e))
    edges = [begin[..., :-1:2], begin[..., 1::2], begin[..., 2::2]]
    return _phases(ordered, readers, edges, lists.log_weight)


def _phases(
    ordered: Callable[[jax.Array], jax.Array],
    stream: jax.Array,
    edges: Sequence[jax.Array],
    log_weight: jax.Array | None,
) -> Phases:
    longest = jnp.argsort(edges[0] - edges[2], axis=-1, stable=True)
    return Phases(
        ordered(stream),
        jnp.stack(edges, axis=-1).astype(jnp.int32),
        longest.astype(jnp.int32),
        None if log_weight is None else powers_of_two(ordered(log_weight)),
    )
