"""Who is estimated from whom: every query of a group reads all keys of that group, and no others.

Without causality a document is a group. With it, the recursion over halves is written as levels of
pairs. Leaves of s = `min_seq_len` tokens attend causally within themselves. At level l a document
is cut into segments of s·2^l tokens; each second one reads the one before it, and the two are a
group::

    level 0   keys ▓▓░░▓▓░░▓▓      query of the last token: its leaf,
    level 1   keys ▓▓▓▓░░░░▓▓      ░ reads the ▓ to its left,
    level 2   keys ▓▓▓▓▓▓▓▓░░      here the whole of level 2's keys

so that each pair of a token and an earlier one belongs to one leaf or one group. Cuts are multiples
of s, wherever a document ends: what a token reads does not depend on how much follows it.
"""

from typing import NamedTuple

import jax.numpy as jnp

from lcattn.ops.segments import DensePositions, dense_positions
from lcattn.ops.visibility import Visibility
from lcattn.typing import Array, Int


class Groups(NamedTuple):
    """The groups of every row, numbered from 0 to P - 1; P stands for none.

    The leading axis b is B, or 1 where all rows are alike.

    Attributes:
      queries: the group of each token as a query, on each level.
      keys: the same as a key.
      draw_ids: what tells the groups of one document apart, wherever it stands in a row.
      exact: what is read exactly instead, or None.
    """

    queries: Int[Array, "b L T"]
    keys: Int[Array, "b L S"]
    draw_ids: Int[Array, "b P"]
    exact: Visibility | None


class Bounds(NamedTuple):
    """What shapes are made of.

    Attributes:
      num_blocks: the most blocks of keys that a row has.
      num_queries: the most queries that it has.
      num_exact: the most consecutive keys that a query reads exactly; they move on as it does.
    """

    num_blocks: int
    num_queries: int
    num_exact: int


def causal_groups(
    length: int, segment_ids: Int[Array, "B T"] | None, *, min_seq_len: int, block_size: int
) -> tuple[Groups, Bounds]:
    """Leaves, and pairs of neighbouring segments on each level."""
    tokens, is_real = _tokens(length, segment_ids)
    place, size = tokens.token - tokens.first, tokens.end - tokens.first
    leaf_end = tokens.first + jnp.minimum((place // min_seq_len + 1) * min_seq_len, size)
    exact = Visibility(tokens.token, tokens.token, jnp.where(is_real, leaf_end, tokens.token))

    spans = [min_seq_len]
    while 2 * spans[-1] < length:
        spans.append(2 * spans[-1])
    # A pair takes a whole segment and at least one more token. One document has a pair for every
    # second of its segments.
    counts = [
        -(-length // span) // 2 if segment_ids is None else length // (span + 1) for span in spans
    ]
    none, first = sum(counts), 0
    queries, keys = [], []
    draw_ids = jnp.zeros((len(place), none), jnp.int32)
    rows = jnp.arange(len(place), dtype=jnp.int32)[:, None]
    for level, (span, count) in enumerate(zip(spans, counts, strict=True)):
        segment = place // span
        begins = is_real & (place % (2 * span) == span)
        begun = first + jnp.cumsum(begins, axis=1, dtype=jnp.int32)
        reads = is_real & (segment % 2 == 1)
        is_read = is_real & (segment % 2 == 0) & ((segment + 1) * span < size)
        queries.append(jnp.where(reads, begun - 1, none))
        keys.append(jnp.where(is_read, begun, none))
        # Where the queries begin, in leaves: an odd number times 2^level.
        draw_ids = draw_ids.at[rows, queries[-1]].set(segment << level, mode="drop")
        first += count
    groups = Groups(jnp.stack(queries, 1), jnp.stack(keys, 1), draw_ids, exact)
    blocks = sum(n * -(-span // block_size) for n, span in zip(counts, spans, strict=True))
    return groups, Bounds(blocks, len(spans) * (length // 2), min_seq_len)


def document_groups(
    num_queries: int,
    num_keys: int,
    segment_ids: Int[Array, "B T"] | None,
    *,
    min_seq_len: int,
    block_size: int,
) -> tuple[Groups, Bounds]:
    """All keys for all queries of a document of more than `min_seq_len` tokens."""
    if segment_ids is None:
        one = jnp.zeros((1, 1, max(num_queries, num_keys)), jnp.int32)
        groups = Groups(one[..., :num_queries], one[..., :num_keys], one[:, 0, :1], None)
        return groups, Bounds(-(-num_keys // block_size), num_queries, 0)
    tokens, is_real = _tokens(num_keys, segment_ids)
    is_long = is_real & (tokens.end - tokens.first > min_seq_len)
    count = num_keys // (min_seq_len + 1)
    begins = is_long & (tokens.token == tokens.first)
    group = jnp.where(is_long, jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1, count)[:, None]
    is_short = is_real & ~is_long
    begin = jnp.where(is_real, tokens.first, tokens.token)
    exact = Visibility(tokens.token, begin, jnp.where(is_short, tokens.end, begin))
    draw_ids = jnp.zeros((len(group), count), jnp.int32)
    blocks = num_keys // block_size + count
    # Those of a document that ends and those of one that begins.
    return Groups(group, group, draw_ids, exact), Bounds(blocks, num_queries, 2 * min_seq_len - 1)


def _tokens(length: int, segment_ids: Array | None) -> tuple[DensePositions, Array]:
    if segment_ids is not None:
        return dense_positions(segment_ids), segment_ids >= 0
    token = jnp.arange(length, dtype=jnp.int32)[None]
    tokens = DensePositions(token, jnp.zeros_like(token), jnp.full_like(token, length))
    return tokens, jnp.full(token.shape, True)
