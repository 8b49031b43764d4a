"""Which keys each query reads, as lists of blocks: what block-sparse mechanisms compile to."""

import dataclasses
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lcattn.ops.block_sparse_attention.tiles import Tiles, spread
from lcattn.ops.visibility import Visibility
from lcattn.typing import Array, Bool, Float, Int
from pallas_kernels.block_sparse_attention.items import FULL, PARTIAL, SKIPPED

BLOCK = 128
"""Queries, and keys, of a block by default: what one step of a kernel multiplies."""


class PlanColumns(NamedTuple):
    """Single keys that blocks of queries read, such as vertical lines or samples.

    Attributes:
      index: the keys `[b,h,m,c]`, ascending, each once and in no block that is listed for the same
        queries; what fills the places past the last does not matter.
      count: how many there are, `[b,h,m]`; may be 0.
      log_weight: what is added to the scores of each, `[b,h,m,c]`, a constant; or None.
    """

    index: Int[Array, "b h m c"]
    count: Int[Array, "b h m"]
    log_weight: Float[Array, "b h m c"] | None = None


@no_type_check  # JAX also fills it with shapes and specs
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """Queries in blocks, and for each block of queries a list of the blocks of keys that it reads.

    A query i reads a key j if the rule `seen` lets it, and j lies in a block that is listed for i's
    block or is one of its single `columns`. Each such pair counts once. Six tokens in blocks of
    two, causal, with the lists (0), (0, 1), (0, 2)::

            key 0 1 2 3 4 5
        query 0 x . . . . .
        query 1 x x . . . .
        query 2 x x x . . .
        query 3 x x x x . .
        query 4 x x . . x .
        query 5 x x . . x x

    Axis b is B, or 1 where all rows of a batch are alike; h is N, or K where the query heads of a
    group share a list (which costs least), or 1. Both may differ from array to array. m counts
    blocks of queries, the last of which may be ragged; so may the last block of keys.

    Build one with `causal_plan`, `sliding_window_plan`, `document_plan`, `block_mask_plan` or
    `top_blocks_plan`, or from arrays.

    Attributes:
      blocks: key blocks `[b,h,m,e]` of each list, ascending, each once; what fills the places past
        the end of a list does not matter.
      count: length of each list `[b,h,m]`; may be 0.
      seen: the rule: a query at position p reads a key only if `begin <= p < end`; of a key that
        ends before it begins, unless `end <= p < begin`. Queries `[b,h,T]`, begins and ends
        `[b,h,S]`. It says all there is of causality, windows, sinks and documents.
      log_weight: what is added to the scores of each entry `[b,h,m,e]`, a constant; or None.
      columns: single keys that are read besides; or None.
      query_block: queries of a block.
      key_block: keys of a block.
    """

    blocks: Int[Array, "b h m e"]
    count: Int[Array, "b h m"]
    seen: Visibility
    log_weight: Float[Array, "b h m e"] | None = None
    columns: PlanColumns | None = None
    query_block: int = dataclasses.field(default=BLOCK, metadata={"static": True})
    key_block: int = dataclasses.field(default=BLOCK, metadata={"static": True})

    @property
    def num_key_blocks(self) -> int:
        """How many blocks the keys have."""
        return -(-self.seen.begin.shape[-1] // self.key_block)

    def listed(self) -> Bool[Array, "b h m e"]:
        """Which places of `blocks` are part of a list."""
        return places(self.blocks) < self.count[..., None]

    def cleared(self) -> "BlockPlan":
        """The same, with 0 in the places past the end of each list."""
        columns = self.columns
        if columns is not None:
            is_listed = places(columns.index) < columns.count[..., None]
            columns = columns._replace(index=jnp.where(is_listed, columns.index, 0))
        blocks = jnp.where(self.listed(), self.blocks, 0)
        return dataclasses.replace(self, blocks=blocks, columns=columns)

    def kinds(self) -> Int[Array, "b h m e"]:
        """`SKIPPED`, `PARTIAL` or `FULL` for each place of `blocks`.

        Derived from the rule, so that it is never wrong: only partial entries need a test of their
        pairs. An entry that is called partial may turn out to have no or all pairs.
        """
        tiles = Tiles.of(self.seen, self.query_block, self.key_block)
        arrays = [self.blocks, self.listed(), *tiles]
        b, h = common(*arrays)
        blocks, listed, *bounds = (spread(x, b, h) for x in arrays)
        tiles = Tiles(*bounds).at(blocks)
        kinds = jnp.where(tiles.all_seen(), FULL, jnp.where(tiles.some_seen(), PARTIAL, SKIPPED))
        return jnp.where(listed, kinds, SKIPPED).astype(jnp.int32)

    def transposed(self) -> "TransposedLists":
        """Who reads each block of keys."""
        keys = jnp.where(self.listed(), self.blocks, self.num_key_blocks)
        keys = lax.collapse(keys, 2).astype(jnp.int32)
        entries = jnp.argsort(keys, axis=-1, stable=True).astype(jnp.int32)
        edges = jnp.arange(self.num_key_blocks + 1, dtype=jnp.int32)
        search = jax.vmap(jax.vmap(lambda x: jnp.searchsorted(x, edges)))
        start = search(jnp.take_along_axis(keys, entries, axis=-1))
        return TransposedLists(entries, start.astype(jnp.int32))

    def density(self, *, causal: bool = True) -> Float[Array, "b h"]:
        """Listed scores over those of dense attention, whose queries are the last of the keys.

        Whole blocks are counted, since whole blocks are computed: a dense causal plan has slightly
        more than 1.
        """
        T, S = self.seen.queries.shape[-1], self.seen.begin.shape[-1]
        area = T * S - (T * (T - 1) / 2 if causal else 0)
        scores = self.query_block * self.key_block * self.count.sum(axis=-1, dtype=jnp.float32)
        scores /= area
        if self.columns is None:
            return scores
        columns = self.query_block * self.columns.count.sum(axis=-1, dtype=jnp.float32) / area
        b, h = common(scores, columns)
        return spread(scores, b, h) + spread(columns, b, h)

    def weights(self) -> Float[Array, "b h T S"]:
        """The whole plan as what is added to each score: -inf where a pair does not count."""
        T, S = self.seen.queries.shape[-1], self.seen.begin.shape[-1]
        added = scatter(self.blocks, self.listed(), self.log_weight, self.num_key_blocks)
        added = jnp.repeat(added, self.key_block, axis=-1)[..., :S]
        if self.columns is not None:
            index, count, log_weight = self.columns
            columns = scatter(index, places(index) < count[..., None], log_weight, S)
            added = jnp.maximum(*(spread(x, *common(added, columns)) for x in (added, columns)))
        added = jnp.repeat(added, self.query_block, axis=-2)[..., :T, :]
        mask = self.seen.mask()
        added, mask = (spread(x, *common(added, mask)) for x in (added, mask))
        return jnp.where(mask, added, -jnp.inf)


class TransposedLists(NamedTuple):
    """The entries of a plan in the order of their keys, for the gradients of keys and values.

    Attributes:
      entries: places `m * e + i` of `blocks`, by key block, then by query block; those of no list
        last. The block of queries of an entry is `entry // e`.
      start: where the entries of each block of keys begin; block j's end where those of j+1 begin.
    """

    entries: Int[Array, "b h m*e"]
    start: Int[Array, "b h n+1"]


def places(ids: Array) -> Int[Array, "e"]:
    """Those of a list."""
    return jnp.arange(ids.shape[-1], dtype=jnp.int32)


def scatter(ids: Array, listed: Array, weights: Array | None, size: int) -> Array:
    """`[b,h,m,size]`: the weight (default 0) at each listed id, -inf elsewhere."""
    weights = jnp.zeros(ids.shape, jnp.float32) if weights is None else weights

    def row(ids: Array, weights: Array) -> Array:
        return jnp.full(size, -jnp.inf, weights.dtype).at[ids].set(weights, mode="drop")

    return jax.vmap(jax.vmap(jax.vmap(row)))(jnp.where(listed, ids, size), weights)


def common(*arrays: Array | np.ndarray) -> tuple[int, int]:
    """Rows and heads that serve all arrays."""
    return max(x.shape[0] for x in arrays), max(x.shape[1] for x in arrays)
