"""Lists of blocks in the order in which the Hopper kernels walk them.

What a block that stays walks past comes in two phases: first the blocks all of whose pairs count,
then those whose pairs are tested. So the kernels have two loops and ask nothing of an entry but
where it lies.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.items import FULL, SKIPPED, Lists, powers_of_two


class Phases(NamedTuple):
    """Entries `[b,h,L]`, those of one block that stays after those of the one before.

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
    """Blocks of queries stay."""
    return _phases(_readers(lists), lists.blocks, lists, lists.blocks.shape[2])


def by_keys(lists: Lists) -> Phases:
    """Blocks of keys stay."""
    return _phases(lists.blocks, _readers(lists), lists, lists.start.shape[-1] - 1)


def _readers(lists: Lists) -> jax.Array:
    """The block of queries of each entry."""
    own = jnp.arange(lists.blocks.shape[2], dtype=jnp.int32)[:, None]
    return jnp.broadcast_to(own, lists.blocks.shape)


def _phases(stay: jax.Array, stream: jax.Array, lists: Lists, count: int) -> Phases:
    """Entries by the block that stays (of `count`), whole ones before partial ones."""
    b, h = lists.kinds.shape[:2]
    key = jnp.where(lists.kinds == SKIPPED, 2 * count, 2 * stay + (lists.kinds != FULL))
    key, stream = (x.reshape(b, h, -1).astype(jnp.int32) for x in (key, stream))
    order = jnp.argsort(key, axis=-1, stable=True)

    def ordered(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x.reshape(b, h, -1), order, axis=-1)

    phase = jnp.arange(2 * count + 1, dtype=jnp.int32)
    begin = jax.vmap(jax.vmap(lambda x: jnp.searchsorted(x, phase)))(ordered(key))
    edges = jnp.stack([begin[..., :-1:2], begin[..., 1::2], begin[..., 2::2]], axis=-1)
    log_weight = lists.log_weight
    if log_weight is not None:
        log_weight = powers_of_two(ordered(log_weight))
    longest = jnp.argsort(edges[..., 0] - edges[..., 2], axis=-1, stable=True)
    return Phases(ordered(stream), edges.astype(jnp.int32), longest.astype(jnp.int32), log_weight)
