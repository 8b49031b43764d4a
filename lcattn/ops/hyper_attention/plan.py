"""Blocks of alike keys, and which of them each query reads: sortLSH for one head.

Keys are sorted by the rank of their bucket and cut into blocks, queries put in chunks of those that
read the same block. All arrays are indices; nothing here has a gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcattn.ops.hyper_attention import draws
from lcattn.ops.hyper_attention.groups import Bounds
from lcattn.ops.hyper_attention.ranked import by_rank, passed
from lcattn.typing import Array, Bool, Int

# Queries a chunk: enough for matrix units, few enough that uneven blocks waste little.
_CHUNK = 128


class Options(NamedTuple):
    """What is fixed while tracing."""

    scale: float
    block_size: int
    sample_size: int
    strict: bool

    @property
    def chunk(self) -> int:
        """Queries a chunk."""
        return min(_CHUNK, self.block_size)


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
    b, c, n = options.block_size, options.chunk, bounds.num_blocks
    queries, keys = (
        by_rank(groups, ranks, P, 2**num_projections)
        for groups, ranks in ((query_groups, query_ranks), (key_groups, key_ranks))
    )
    sizes = keys.counts.sum(axis=1, dtype=jnp.int32)
    num_blocks = -(-sizes // b)
    blocks = _Pieces.of(num_blocks, n)
    at = key_groups, key_ranks
    key_place = _of_members((blocks.first[:, None] * b + keys.origin)[at] + keys.nth, at, P, n * b)

    at = query_groups, query_ranks
    if options.strict:
        nth = jnp.clip(keys.below // b, 0, jnp.maximum(num_blocks - 1, 0)[:, None])
        block = blocks.first[:, None] + nth
        readers = jnp.zeros(n, jnp.int32).at[block].add(queries.counts, mode="drop")
        begin = jnp.full(n, T, jnp.int32).at[block].min(queries.below, mode="drop")
        chunks = _Pieces.of(-(-readers // c), _num_chunks(bounds, c, T, S, options))
        place = (chunks.first[block] * c - begin[block] + queries.origin)[at] + queries.nth
    else:
        num_queries = queries.counts.sum(axis=1)
        share = jnp.maximum(-(-b * num_queries // jnp.maximum(sizes, 1)), 1)
        nth = jnp.arange(n, dtype=jnp.int32) - blocks.first[blocks.whole]
        rest = num_queries[blocks.whole] - nth * share[blocks.whole]
        is_last = nth == num_blocks[blocks.whole] - 1
        readers = jnp.where(is_last, rest, jnp.minimum(rest, share[blocks.whole]))
        readers = jnp.where(nth < num_blocks[blocks.whole], jnp.maximum(readers, 0), 0)
        chunks = _Pieces.of(-(-readers // c), _num_chunks(bounds, c, T, S, options))
        group = query_groups
        place = queries.origin[at] + queries.nth
        nth = jnp.minimum(place // share[group], num_blocks[group] - 1)
        place += chunks.first[blocks.first[group] + nth] * c - nth * share[group]
    num_places = len(chunks.whole) * c
    place = _of_members(place, at, P, num_places)

    samples = jax.vmap(lambda i, n: draws.sample(key, i, n, options.sample_size))(draw_ids, sizes)
    return Plan(
        keys=_inverse(key_place, jnp.arange(S, dtype=jnp.int32), n * b, S).reshape(n, b),
        key_place=key_place,
        readers=_inverse(
            place, jnp.arange(L * T, dtype=jnp.int32).reshape(L, T), num_places, L * T
        ).reshape(-1, c),
        place=place,
        block=chunks.whole,
        group=blocks.whole[chunks.whole],
        samples=jnp.minimum(blocks.first[:, None] * b + samples, n * b - 1),
        num_keys=sizes,
    )


class _Pieces(NamedTuple):
    """Wholes in pieces, one after another.

    Attributes:
      first: piece of each whole.
      whole: of each piece; that of pieces which are left over is the last.
    """

    first: Int[Array, "wholes"]
    whole: Int[Array, "pieces"]

    @classmethod
    def of(cls, counts: Int[Array, "wholes"], num_pieces: int) -> "_Pieces":
        ends = jnp.cumsum(counts, dtype=jnp.int32)
        return cls(ends - counts, jnp.minimum(passed(ends, num_pieces), len(counts) - 1))


def _of_members(places: Array, at: tuple[Array, Array], num_groups: int, none: int) -> Array:
    """Places of members; `none` for those of no group."""
    return jnp.where(at[0] < num_groups, places, none)


def _inverse(place: Array, member: Array, num_places: int, none: int) -> Array:
    """Which member is at each place."""
    return jnp.full(num_places, none, jnp.int32).at[place].set(member, mode="drop")


def _num_chunks(bounds: Bounds, chunk: int, T: int, S: int, options: Options) -> int:
    """Every block may leave one chunk unfilled; in even blocks that happens at a known place."""
    uneven = bounds.num_queries // chunk + bounds.num_blocks
    if options.strict or T > S:
        return uneven
    return min(uneven, bounds.num_blocks * -(-options.block_size // chunk))
