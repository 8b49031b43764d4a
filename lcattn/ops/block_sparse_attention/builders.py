"""Plans of well-known patterns, in plain JAX: their lists may depend on the input, under `jit` too.

How long lists may become has to be known while tracing: it follows from the pattern (window, number
of blocks) or from a mask that is concrete; otherwise every list has room for all blocks.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lcattn.errors import argument_error
from lcattn.ops.block_sparse_attention.plan import BLOCK, BlockPlan
from lcattn.ops.block_sparse_attention.tiles import Tiles
from lcattn.ops.checks import check_segment_ids, check_size
from lcattn.ops.sharding import partitioned
from lcattn.ops.visibility import Visibility, visibility
from lcattn.typing import Array, Bool, Float, SegmentIds


def causal_plan(
    num_keys: int,
    *,
    num_queries: int | None = None,
    query_block: int = BLOCK,
    key_block: int = BLOCK,
) -> BlockPlan:
    """Every key up to the query: dense causal attention.

    Args:
      num_keys: S.
      num_queries: T; the queries are the last T tokens. Default: S.
      query_block, key_block: sizes of blocks.
    """
    check_size("num_keys", num_keys)
    seen = _rule(num_keys, num_queries, causal=True)
    return plan_of_rule(seen, query_block=query_block, key_block=key_block)


@partitioned
def sliding_window_plan(
    num_keys: int,
    window: int | Sequence[int],
    *,
    sinks: int = 0,
    segment_ids: SegmentIds | None = None,
    num_queries: int | None = None,
    query_block: int = BLOCK,
    key_block: int = BLOCK,
) -> BlockPlan:
    """The last keys, and the first few (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453).

    Args:
      num_keys: S.
      window: number of keys seen, the query's own included; or one such number for each head.
      sinks: the first keys of a document, which all of its queries see besides.
      segment_ids: document of each token `[B,T]`, for packed rows (T = S).
      num_queries: T; the queries are the last T tokens. Default: S.
      query_block, key_block: sizes of blocks.
    """
    check_size("num_keys", num_keys)
    windows = (window,) if isinstance(window, int) else tuple(window)
    for size in windows:
        check_size("window", size)
    if isinstance(sinks, bool) or sinks < 0:
        raise argument_error("sinks", "a whole number of at least 0", repr(sinks))
    rules = [
        _rule(num_keys, num_queries, segment_ids, causal=True, window=size, sinks=sinks)
        for size in windows
    ]
    seen = Visibility(*(jnp.concatenate(x, axis=1) for x in zip(*rules, strict=True)))
    return plan_of_rule(
        seen, query_block=query_block, key_block=key_block, window=max(windows), sinks=sinks
    )


@partitioned
def document_plan(
    segment_ids: SegmentIds,
    *,
    causal: bool = True,
    longest: int | None = None,
    query_block: int = BLOCK,
    key_block: int = BLOCK,
) -> BlockPlan:
    """The query's own document, for packed rows.

    Args:
      segment_ids: document of each token `[B,T]`; negative ids are padding.
      causal: only up to the query.
      longest: the most tokens that a document has, where ids are not known while tracing. Lists
        then have room for such a document; without it, for the whole row: (T/128)^2 entries, 67
        million for a million tokens. What is longer than said loses keys.
      query_block, key_block: sizes of blocks.
    """
    if longest is not None:
        check_size("longest", longest)
    seen = _rule(segment_ids.shape[1], None, segment_ids, causal=causal)
    # Without causality a block of queries may see the end of one document and the next.
    window = longest if longest is None or causal else 2 * longest - 1
    return plan_of_rule(seen, query_block=query_block, key_block=key_block, window=window)


@partitioned
def block_mask_plan(
    mask: Bool[Array, "b h m n"],
    num_keys: int,
    *,
    causal: bool = True,
    segment_ids: SegmentIds | None = None,
    num_queries: int | None = None,
    query_block: int = BLOCK,
    key_block: int = BLOCK,
) -> BlockPlan:
    """The blocks that a mask names; blocks that the rule hides whole are left out.

    Args:
      mask: whether block m of queries reads block n of keys. b is B or 1, and h is N, K or 1.
      num_keys: S.
      causal: of these keys, only those up to the query.
      segment_ids: of these keys, only those of the query's document `[B,T]` (T = S).
      num_queries: T; the queries are the last T tokens. Default: S.
      query_block, key_block: sizes of blocks.
    """
    seen = _rule(num_keys, num_queries, segment_ids, causal=causal)
    tiles = Tiles.of(seen, query_block, key_block)
    _check_blocks("mask", mask, tiles)
    chosen = mask & tiles.crossed().some_seen()
    return _plan(chosen, seen, query_block, key_block)


@partitioned
def top_blocks_plan(
    scores: Float[Array, "b h m n"],
    num_blocks: int,
    num_keys: int,
    *,
    first: int = 1,
    recent: int = 1,
    causal: bool = True,
    segment_ids: SegmentIds | None = None,
    num_queries: int | None = None,
    query_block: int = BLOCK,
    key_block: int = BLOCK,
) -> BlockPlan:
    """The best blocks by a score, as SeerAttention and MInference choose them.

    Equal scores go to the earlier block, so that a plan is the same wherever it is made. Scores
    that later queries of a block had a part in tell its earlier queries of their future: values
    never leak, but the choice does.

    Args:
      scores: of each block of keys for each block of queries. b is B or 1, and h is N, K or 1.
      num_blocks: the most blocks that a list has, `first` and `recent` ones included.
      num_keys: S.
      first: blocks at the start that are always listed.
      recent: blocks up to the newest that a query sees that are always listed. At least 1 keeps
        causal rows from being empty.
      causal: of these keys, only those up to the query.
      segment_ids: of these keys, only those of the query's document `[B,T]` (T = S).
      num_queries: T; the queries are the last T tokens. Default: S.
      query_block, key_block: sizes of blocks.
    """
    check_size("num_blocks", num_blocks)
    for name, count in (("first", first), ("recent", recent)):
        if isinstance(count, bool) or count < 0:
            raise argument_error(name, "a whole number of at least 0", repr(count))
    if first + recent > num_blocks:
        expected = f"at least first + recent = {first + recent}"
        raise argument_error("num_blocks", expected, num_blocks)
    seen = _rule(num_keys, num_queries, segment_ids, causal=causal)
    tiles = Tiles.of(seen, query_block, key_block)
    _check_blocks("scores", scores, tiles)
    visible = tiles.crossed().some_seen()
    index = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    newest = jnp.max(jnp.where(visible, index, -1), axis=-1, keepdims=True)
    always = (index < first) | (index > newest - recent)
    ranked = jnp.where(always, jnp.inf, jnp.nan_to_num(scores, nan=-jnp.inf, posinf=None))
    ranked = jnp.where(visible, jnp.maximum(ranked, jnp.finfo(scores.dtype).min), -jnp.inf)
    best, blocks = lax.top_k(ranked, min(num_blocks, scores.shape[-1]))
    chosen = jnp.where(best > -jnp.inf, blocks, scores.shape[-1])
    return _from_lists(jnp.sort(chosen, axis=-1), seen, query_block, key_block)


def plan_of_rule(
    seen: Visibility,
    *,
    query_block: int,
    key_block: int,
    window: int | None = None,
    sinks: int = 0,
) -> BlockPlan:
    """Every block in which a rule lets a pair count.

    Args:
      seen: the rule, arrays `[b,h,...]`.
      query_block, key_block: sizes of blocks.
      window: what bounds the lists: each query sees no more than so many consecutive keys, which
        move on by at most one key a query. None: lists have room for all blocks.
      sinks: and so many others, consecutive and the same for a block of queries.
    """
    most = None
    if window is not None:
        most = _touched(window + query_block - 1, key_block) + _touched(sinks, key_block)
    visible = Tiles.of(seen, query_block, key_block).crossed().some_seen()
    return _plan(visible, seen, query_block, key_block, most)


def _rule(num_keys: int, num_queries: int | None, segment_ids=None, **options) -> Visibility:
    T = num_keys if num_queries is None else num_queries
    check_size("num_queries", T)
    if num_keys < T:
        raise argument_error("num_queries", f"at most num_keys={num_keys}", T)
    if segment_ids is not None:
        if num_keys != T:
            raise argument_error("segment_ids", "as many queries as keys", f"{T}, {num_keys}")
        check_segment_ids(segment_ids, (len(segment_ids), T))
    seen = visibility(T, num_keys, segment_ids=segment_ids, query_position=num_keys - T, **options)
    return Visibility(*(x[:, None] for x in seen))


def _touched(keys: int, block: int) -> int:
    """The most blocks that consecutive keys may lie in."""
    return -(-(keys - 1) // block) + 1 if keys else 0


def _check_blocks(name: str, array: Array, tiles: Tiles) -> None:
    m, n = tiles.highest.shape[-1], tiles.begins.shape[-1]
    if array.ndim != 4 or array.shape[2:] != (m, n):
        raise argument_error(name, f"shape [b,h,m,n] with m, n = {(m, n)}", array.shape)


def _plan(
    chosen: Bool[Array, "b h m n"],
    seen: Visibility,
    query_block: int,
    key_block: int,
    most: int | None = None,
) -> BlockPlan:
    """The plan of chosen blocks."""
    n = chosen.shape[-1]
    if not isinstance(chosen, jax.core.Tracer):
        most = int(np.asarray(chosen).sum(axis=-1).max(initial=0))
    most = n if most is None else min(most, n)
    ids = jnp.where(chosen, jnp.arange(n, dtype=jnp.int32), n)
    return _from_lists(jnp.sort(ids, axis=-1)[..., : max(most, 1)], seen, query_block, key_block)


def _from_lists(ids: Array, seen: Visibility, query_block: int, key_block: int) -> BlockPlan:
    """The plan of ascending lists, filled up with what is past the last block."""
    n = -(-seen.begin.shape[-1] // key_block)
    return BlockPlan(
        blocks=jnp.where(ids < n, ids, 0).astype(jnp.int32),
        count=jnp.sum(ids < n, axis=-1, dtype=jnp.int32),
        seen=seen,
        query_block=query_block,
        key_block=key_block,
    )
