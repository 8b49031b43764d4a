"""Blocks of alike keys, and which of them each query reads: sortLSH for one head.

Keys are sorted by the rank of their bucket and cut into blocks, queries put in chunks of those that
read the same block. All arrays are indices; nothing here has a gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcattn.ops.hyper_attention import draws
from lcattn.ops.hyper_attention.groups import Bounds
from lcattn.typing import Array, Bool, Int

# Queries a chunk: enough for matrix units, few enough that uneven blocks waste little.
_CHUNK = 128


class Options(NamedTuple):
    """What is fixed while tracing."""

    scale: float
    block_size: int
    sample_size: int
    strict: bool


class Cut(NamedTuple):
    """Members of groups in pieces of one size; a piece has members of one group only.

    Attributes:
      members: what fills each place of a piece; past the last member where it is empty.
      group: of each piece; past the last group for pieces that are left over.
      place: of each member, counted over all pieces; past the last for members of no group.
    """

    members: Int[Array, "pieces size"]
    group: Int[Array, "pieces"]
    place: Int[Array, "members"]


class Plan(NamedTuple):
    """What one head reads.

    Attributes:
      keys: tokens of each block of keys; S where it is empty.
      key_place: of each token on each level among all keys of all blocks.
      readers: who is in each chunk of queries, as level · T + token; L · T where it is empty.
      place: of each token on each level among all queries of all chunks.
      block: that the queries of each chunk read.
      group: that it belongs to.
      samples: places of the sampled keys of each group among all keys of all blocks.
      num_keys: of each group.
    """

    keys: Int[Array, "n b"]
    key_place: Int[Array, "L S"]
    readers: Int[Array, "C c"]
    place: Int[Array, "L T"]
    block: Int[Array, "C"]
    group: Int[Array, "C"]
    samples: Int[Array, "P m"]
    num_keys: Int[Array, "P"]

    def queries(self) -> Int[Array, "*heads C c"]:
        """Tokens of each chunk of queries; T where it is empty."""
        L, T = self.place.shape[-2:]
        return jnp.where(self.readers < L * T, self.readers % T, T)

    def key_exists(self, num_keys: int) -> Bool[Array, "*heads n b"]:
        """Which places of the blocks hold a key."""
        return self.keys < num_keys


def make_plan(
    query_ranks: Int[Array, "T"],
    key_ranks: Int[Array, "S"],
    key: Array,
    query_groups: Int[Array, "L T"],
    key_groups: Int[Array, "L S"],
    draw_ids: Int[Array, "P"],
    *,
    num_projections: int,
    bounds: Bounds,
    options: Options,
) -> Plan:
    """Sorts, cuts and samples the keys, and gives each query its block."""
    (L, T), S, P = query_groups.shape, key_groups.shape[1], len(draw_ids)
    b, c = options.block_size, min(_CHUNK, options.block_size)

    def codes(groups: Array, ranks: Array) -> Array:
        """Sorts by group, then by rank."""
        return ((groups << num_projections) + ranks).reshape(-1)

    key_codes, query_codes = codes(key_groups, key_ranks), codes(query_groups, query_ranks)
    query_groups, key_groups = query_groups.reshape(-1), key_groups.reshape(-1)
    order = _argsort(key_codes)
    sizes, begins = _sizes(key_groups[order], P)
    blocks = cut(key_groups, order, P, b, bounds.num_blocks)
    num_blocks = -(-sizes // b)
    first_block = jnp.cumsum(num_blocks, dtype=jnp.int32) - num_blocks

    group = jnp.minimum(query_groups, P - 1)
    if options.strict:
        below = jnp.searchsorted(key_codes[order], query_codes).astype(jnp.int32) - begins[group]
        nth = below // b
    else:
        query_order = _argsort(query_codes)
        query_sizes, query_begins = _sizes(query_groups[query_order], P)
        below = _inverse(query_order) - query_begins[group]
        nth = below // jnp.maximum(-(-b * query_sizes // jnp.maximum(sizes, 1)), 1)[group]
    block = first_block[group] + jnp.minimum(nth, num_blocks[group] - 1)
    block = jnp.where(query_groups < P, block, bounds.num_blocks)

    num_chunks = _num_chunks(bounds, c, T, S, options)
    chunks = cut(block, _argsort(block), bounds.num_blocks, c, num_chunks)
    samples = jax.vmap(lambda i, n: draws.sample(key, i, n, options.sample_size))(draw_ids, sizes)
    last = bounds.num_blocks - 1
    chunk_block = jnp.minimum(chunks.group, last)
    return Plan(
        keys=jnp.where(blocks.members < L * S, blocks.members % S, S),
        key_place=blocks.place.reshape(L, S),
        readers=chunks.members,
        place=chunks.place.reshape(L, T),
        block=chunk_block,
        group=jnp.minimum(blocks.group[chunk_block], P - 1),
        samples=jnp.minimum(first_block[:, None] * b + samples, bounds.num_blocks * b - 1),
        num_keys=sizes,
    )


def cut(
    groups: Int[Array, "members"],
    order: Int[Array, "members"],
    num_groups: int,
    size: int,
    num_pieces: int,
) -> Cut:
    """Cuts each group into pieces, its last one filled up with nothing.

    Args:
      groups: of each member; `num_groups` for those of none.
      order: of the members, groups ascending.
      num_groups, size, num_pieces: how many groups, places a piece, and pieces at the most.
    """
    count = len(groups)
    sorted_groups = groups[order]
    sizes, begins = _sizes(sorted_groups, num_groups)
    pieces = -(-sizes // size)
    ends = jnp.cumsum(pieces, dtype=jnp.int32)
    group = jnp.minimum(sorted_groups, num_groups - 1)
    index = jnp.arange(count, dtype=jnp.int32)
    places = (ends - pieces)[group] * size + index - begins[group]
    places = jnp.where(sorted_groups < num_groups, places, num_pieces * size)
    members = jnp.full(num_pieces * size, count, jnp.int32)
    piece = jnp.arange(num_pieces, dtype=jnp.int32)
    return Cut(
        members=members.at[places].set(order, mode="drop").reshape(num_pieces, size),
        group=jnp.searchsorted(ends, piece, side="right").astype(jnp.int32),
        place=jnp.zeros_like(places).at[order].set(places),
    )


def _num_chunks(bounds: Bounds, chunk: int, T: int, S: int, options: Options) -> int:
    """Every block may leave one chunk unfilled; in even blocks that happens at a known place."""
    uneven = bounds.num_queries // chunk + bounds.num_blocks
    if options.strict or T > S:
        return uneven
    return min(uneven, bounds.num_blocks * -(-options.block_size // chunk))


def _sizes(sorted_groups: Array, num_groups: int) -> tuple[Array, Array]:
    """How many members each group has, and where they begin."""
    edges = jnp.searchsorted(sorted_groups, jnp.arange(num_groups + 1, dtype=jnp.int32))
    edges = edges.astype(jnp.int32)
    return jnp.diff(edges), edges[:-1]


def _argsort(x: Array) -> Array:
    return jnp.argsort(x, stable=True).astype(jnp.int32)


def _inverse(order: Array) -> Array:
    return jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=jnp.int32))
