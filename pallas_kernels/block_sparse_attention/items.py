"""Lists of blocks as one list of work items a head, in the order in which a kernel takes them.

An item is a pair of blocks, one that stays (its sums are kept) and one that streams past it. Each
block that stays has at least one item, of the kind `SKIPPED` if it has nothing to do, since it is
its items that write its results.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

SKIPPED, PARTIAL, FULL = 0, 1, 2
"""The kinds of an entry: no pair in it counts, some do, all do."""

_BLOCK_BITS, _KIND_BITS = 14, 2

MOST_BLOCKS = 2**_BLOCK_BITS
"""Blocks of queries, and of keys, that an item can tell apart."""

NEVER = jnp.iinfo(jnp.int32).max
"""Where keys begin that no query reads."""


class Lists(NamedTuple):
    """Which blocks of keys each block of queries reads.

    Attributes:
      blocks: key blocks `[b,h,m,e]`, those with pairs that count ascending, each once.
      kinds: `SKIPPED`, `PARTIAL` or `FULL` for each, `[b,h,m,e]`.
      log_weight: what is added to the scores of each, `[b,h,m,e]`, or None.
      entries: places `m * e + i` of `blocks` by key block, `[b,h,m*e]`.
      start: where the entries of each key block begin, and the last one's end, `[b,h,n+1]`.
    """

    blocks: jax.Array
    kinds: jax.Array
    log_weight: jax.Array | None
    entries: jax.Array
    start: jax.Array


class Items(NamedTuple):
    """Work items of every head, `[b,h,L]`.

    Attributes:
      packed: the block that stays, the one that streams, and the kind, in one integer.
      log_weight: in powers of two, float32, or None.
    """

    packed: jax.Array
    log_weight: jax.Array | None


def by_queries(lists: Lists) -> Items:
    """Blocks of queries stay."""
    b, h, m, e = lists.blocks.shape
    kinds = lists.kinds
    # A step that does nothing names the block that is there already, so that none is fetched.
    place = lax.cummax(jnp.where(kinds == SKIPPED, 0, jnp.arange(e, dtype=jnp.int32)), axis=3)
    stream = jnp.take_along_axis(lists.blocks, place, axis=3)
    stay = jnp.broadcast_to(jnp.arange(m, dtype=jnp.int32)[:, None], stream.shape)
    log_weight = None if lists.log_weight is None else powers_of_two(lists.log_weight)
    return Items(
        _pack(*(x.reshape(b, h, -1) for x in (stay, stream, kinds))),
        None if log_weight is None else log_weight.reshape(b, h, -1),
    )


def by_keys(lists: Lists) -> Items:
    """Blocks of keys stay; before the entries of each comes an item that does nothing."""
    b, h, m, e = lists.blocks.shape
    n = lists.start.shape[-1] - 1
    kinds, log_weight = (
        None if x is None else x.reshape(b * h, -1) for x in (lists.kinds, lists.log_weight)
    )

    def of_head(entries, start, kinds, log_weight):
        item = jnp.arange(m * e + n, dtype=jnp.int32)
        first = start[:-1] + jnp.arange(n, dtype=jnp.int32)
        stay = jnp.searchsorted(first, item, side="right").astype(jnp.int32) - 1
        place = start[stay] + item - first[stay] - 1
        is_entry = (place >= start[stay]) & (place < start[stay + 1])
        entry = entries[jnp.clip(place, start[stay], jnp.maximum(start[stay + 1] - 1, 0))]
        kind = jnp.where(is_entry, kinds[entry], SKIPPED)
        weight = None if log_weight is None else powers_of_two(log_weight[entry])
        return Items(_pack(stay, entry // e, kind), weight)

    entries, start = (x.reshape(b * h, -1) for x in (lists.entries, lists.start))
    items = jax.vmap(of_head)(entries, start, kinds, log_weight)
    return jax.tree.map(lambda x: x.reshape(b, h, -1), items)


def unpack(item: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The block that stays, the one that streams, and the kind."""
    return (
        lax.shift_right_logical(item, _BLOCK_BITS + _KIND_BITS),
        lax.shift_right_logical(item, _KIND_BITS) & (MOST_BLOCKS - 1),
        item & (2**_KIND_BITS - 1),
    )


def _pack(stay: jax.Array, stream: jax.Array, kind: jax.Array) -> jax.Array:
    packed = (stay << (_BLOCK_BITS + _KIND_BITS)) | (stream << _KIND_BITS) | kind
    return packed.astype(jnp.int32)


def spans(begin: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Begins and spans such that a query at p reads a key if `p - begin < span`.

    In int32 that wraps around: `begin <= p < end`, or not `end <= p < begin` where that is less.
    Both are half a circle off, so that signed numbers compare as unsigned ones would.
    """
    half = jnp.int32(jnp.iinfo(jnp.int32).min)
    return begin ^ half, (end - begin) ^ half


def powers_of_two(log_weight: jax.Array) -> jax.Array:
    """Log-weights as kernels add them to scores."""
    return (log_weight * 1.4426950408889634).astype(jnp.float32)
