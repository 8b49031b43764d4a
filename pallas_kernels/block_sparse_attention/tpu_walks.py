r"""The walks of the TPU kernels: a block stays, those that it reads or that read it stream past it.

Scores `t`, in powers of two, are tiles `[keys, queries]` (see `pallas_kernels.tpu`): a query's
numbers are rows, and sums over its keys sums over rows.

    attend           queries stay    O = v 2^(t - l),  l = log2 sum 2^t, as the largest t grows
    query_gradients  queries stay    d q = k d,     d = 2^(t - l) (v·g - mean)
    key_gradients    keys stay       d k = q d^T,   d v = g 2^(t - l)^T

The grid has a step for every work item (`items`), which the kernel knows before it starts, so that
the blocks of the next item are fetched while this one is worked on. An item all of whose pairs
count is not tested.

Floor of an item of 128 x 128 scores at H = 128: 8.4 MFLOP in `attend`, 12.6 and 16.8 in the others,
and 16384 powers of two each. Nothing was timed on a TPU.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention.items import FULL, PARTIAL, Items, unpack
from pallas_kernels.tpu import column, dot, launch

HIDDEN = -2e38
"""The score of a pair that does not count."""

LN2 = 0.6931471805599453


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a walk runs, as fixed while tracing.

    Attributes:
      scale: factor of scores.
      rows: rows of a block of queries; heads that share a list are rows of one block.
      keys: keys of a block.
      strip: keys that are worked on at a time.
      is_part: what gradients of log-sum-exps are, as of `mosaic_tpu.block_sparse_attention`.
      interpret: whether to run in the TPU simulator.
    """

    scale: float
    rows: int
    keys: int
    strip: int
    is_part: bool = False
    interpret: bool = False


@dataclasses.dataclass(frozen=True)
class Rule:
    """A query at position p reads a key only if `p - begin < span`, in int32 that wraps around.

    Attributes:
      positions: of queries, `[b,h,1,rows]` in int32.
      edges: begins and spans of keys, `[b,h,2,S]` in int32, as of `items.spans`.
    """

    positions: jax.Array
    edges: jax.Array


def attend(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, items: Items, rule: Rule
) -> tuple[jax.Array, jax.Array]:
    """The output `[B,P,H,rows]` and log-sum-exp `[B,P,1,rows]`, float32.

    Args:
      plan: options.
      q: queries `[B,P,F,rows]`.
      k: keys `[B,K,F,S]`; K divides P.
      v: values `[B,K,H,S]`.
      items: with queries that stay.
      rule: which pairs of partial items count.
    """

    def block_sparse_attention_forward(tile, q, k, v, out, lse, mixed, total, highest):
        @tile.first
        def _():
            mixed[...] = jnp.zeros_like(mixed)
            total[...] = jnp.zeros_like(total)
            highest[...] = jnp.full_like(highest, HIDDEN)

        @tile.strips
        def _(keys, scores):
            t = scores(q, k)
            before = highest[...]
            after = jnp.maximum(before, t.max(axis=0, keepdims=True))
            # Rows that have seen nothing yet stay hidden; subtract 0 there.
            base = jnp.where(after == HIDDEN, 0.0, after)
            weights = jnp.exp2(jnp.minimum(t - base, 0.0))
            kept = jnp.exp2(before - base)
            total[...] = kept * total[...] + weights.sum(axis=0, keepdims=True)
            mixed[...] = kept * mixed[...] + dot(v[:, keys], weights.astype(v.dtype))
            highest[...] = after

        @tile.last
        def _():
            empty = total[...] == 0.0
            safe = jnp.where(empty, 1.0, total[...])
            out[...] = (mixed[...] / safe).astype(out.dtype)
            lse[...] = jnp.where(empty, -jnp.inf, LN2 * highest[...] + jnp.log(safe))

    (B, P, _, rows), H = q.shape, v.shape[2]
    return _walk(
        plan, block_sparse_attention_forward, [q], [k, v], items, rule, stays="queries", heads=P,
        out_type=(
            jax.ShapeDtypeStruct((B, P, H, rows), q.dtype),
            jax.ShapeDtypeStruct((B, P, 1, rows), jnp.float32),
        ),
        scratch=[(H, plan.rows), (1, plan.rows), (1, plan.rows)],
    )  # fmt: skip


def query_gradients(
    plan: Plan,
    q: jax.Array,
    g: jax.Array,
    numbers: jax.Array,
    k: jax.Array,
    v: jax.Array,
    items: Items,
    rule: Rule,
) -> jax.Array:
    """`d q` `[B,P,F,rows]`.

    Args:
      plan: options.
      q: queries `[B,P,F,rows]`.
      g: the output's gradient `[B,P,H,rows]`.
      numbers: log-sum-exp in powers of two, and mean, `[B,P,2,rows]` in float32.
      k: keys `[B,K,F,S]`.
      v: values `[B,K,H,S]`.
      items: with queries that stay.
      rule: which pairs of partial items count.
    """

    def block_sparse_attention_query_gradients(tile, q, g, numbers, k, v, dq, total):
        @tile.first
        def _():
            total[...] = jnp.zeros_like(total)

        @tile.strips
        def _(keys, scores):
            _, d = _weights(scores(q, k), g, numbers, v[:, keys])
            total[...] += dot(k[:, keys], d.astype(k.dtype))

        @tile.last
        def _():
            dq[...] = (plan.scale * total[...]).astype(dq.dtype)

    (dq,) = _walk(
        plan, block_sparse_attention_query_gradients, [q, g, numbers], [k, v], items, rule,
        stays="queries", heads=q.shape[1], out_type=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
        scratch=[(q.shape[2], plan.rows)],
    )  # fmt: skip
    return dq


def key_gradients(
    plan: Plan,
    q: jax.Array,
    g: jax.Array,
    numbers: jax.Array,
    k: jax.Array,
    v: jax.Array,
    items: Items,
    rule: Rule,
) -> tuple[jax.Array, jax.Array]:
    """`d k` `[B,P,F,S]` and `d v` `[B,P,H,S]` in float32, arguments as above; keys stay."""

    def block_sparse_attention_key_gradients(tile, k, v, q, g, numbers, dk, dv):
        @tile.first
        def _():
            dk[...] = jnp.zeros_like(dk)
            dv[...] = jnp.zeros_like(dv)

        @tile.strips
        def _(keys, scores):
            weights, d = _weights(scores(q, k), g, numbers, v[:, keys])
            dk[:, keys] += plan.scale * dot(q[...], d.astype(q.dtype), (1, 1))
            dv[:, keys] += dot(g[...], weights.astype(g.dtype), (1, 1))

    (B, P), S = q.shape[:2], k.shape[3]
    return _walk(
        plan, block_sparse_attention_key_gradients, [k, v], [q, g, numbers], items, rule,
        stays="keys", heads=P,
        out_type=[jax.ShapeDtypeStruct((B, P, x.shape[2], S), jnp.float32) for x in (k, v)],
    )  # fmt: skip


def _weights(t: jax.Array, g: Any, numbers: Any, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Probabilities of scores `[keys, queries]`, and gradients of these scores over the scale."""
    p = jnp.exp2(jnp.minimum(t - numbers[0:1, :], 0.0))
    return p, p * (dot(v, g[...], (0, 0)) - numbers[1:2, :])


class _Tile:
    """An item: a block of keys and one of queries.

    Attributes:
      first, last: decorators of what is done before and after all items of a block that stays.
    """

    def __init__(self, plan: Plan, *, first, last, kind, log_weight, positions, edges):
        self.first, self.last = pl.when(first), pl.when(last)
        self._plan, self._kind, self._log_weight = plan, kind, log_weight
        self._positions, self._edges = positions, edges

    def strips(self, body: Callable[[Any, Callable], None]) -> None:
        """Calls `body(keys, scores)` on every strip of keys, if any pair counts.

        `scores(q, k)` gives those of the strip, `[keys, queries]`.
        """
        plan = self._plan

        def walk(is_partial: bool) -> None:
            @pl.loop(0, plan.keys // plan.strip)
            def _(strip):
                keys = pl.ds(pl.multiple_of(strip * plan.strip, plan.strip), plan.strip)

                def scores(q, k):
                    t = (plan.scale / LN2) * dot(k[:, keys], q[...], (0, 0))
                    if self._log_weight is not None:
                        t += self._log_weight
                    return jnp.where(self._seen(keys), t, HIDDEN) if is_partial else t

                body(keys, scores)

        pl.when(self._kind == FULL)(lambda: walk(is_partial=False))
        pl.when(self._kind == PARTIAL)(lambda: walk(is_partial=True))

    def _seen(self, keys: Any) -> jax.Array:
        position = self._positions[...]
        begin, span = (column(self._edges[i : i + 1, keys]) for i in (0, 1))
        return position - begin < span


def _walk(
    plan: Plan,
    body: Any,
    resident: Sequence[jax.Array],
    streaming: Sequence[jax.Array],
    items: Items,
    rule: Rule,
    *,
    stays: str,
    heads: int,
    out_type: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[tuple[int, int]] = (),
) -> Any:
    """Runs a kernel on every item of every head.

    Args:
      plan: options.
      body: the kernel: of a `_Tile`, blocks of arrays, of outputs, and scratch in float32.
      resident: what stays, `[B,heads,size,tokens]`.
      streaming: what streams past it. Heads of lists may share one of keys.
      items: the work.
      rule: which pairs of partial items count.
      stays: "queries" or "keys".
      heads: P, heads of lists.
      out_type: outputs, like what stays.
      scratch: shapes of scratch.
    """
    by_queries = stays == "queries"
    b, h, length = items.packed.shape

    def place(row, head):
        """Where the items of a head begin."""
        return ((row if b > 1 else 0) * h + lax.div(head * h, heads)) * length

    def spec(x, *, is_query, resides):
        share = heads // x.shape[1]

        def at(row, head, item, packed, *_):
            stay, stream, _ = unpack(packed[place(row, head) + item])
            token = stay if resides else stream
            return row if x.shape[0] > 1 else 0, lax.div(head, share), 0, token

        return pl.BlockSpec((None, None, x.shape[2], plan.rows if is_query else plan.keys), at)

    def kernel(packed, *refs):
        log_weight = None
        if items.log_weight is not None:
            log_weight, *refs = refs
        positions, edges, *refs = refs
        row, head, item = (pl.program_id(axis) for axis in range(3))
        begin = place(row, head)
        own, _, kind = unpack(packed[begin + item])
        before, after = (
            unpack(packed[begin + jnp.clip(item + step, 0, length - 1)])[0] for step in (-1, 1)
        )
        tile = _Tile(
            plan, kind=kind, positions=positions, edges=edges,
            first=(item == 0) | (before != own), last=(item == length - 1) | (after != own),
            log_weight=None if log_weight is None else log_weight[begin + item],
        )  # fmt: skip
        body(tile, *refs)

    kernel.__name__ = body.__name__  # for profiles
    scalars = [x.reshape(-1) for x in items if x is not None]
    return launch(
        kernel, rule.positions, rule.edges, *resident, *streaming, scalars=scalars,
        grid=(len(resident[0]), heads, length), sequential=1,
        in_specs=[
            spec(rule.positions, is_query=True, resides=by_queries),
            spec(rule.edges, is_query=False, resides=not by_queries),
            *(spec(x, is_query=by_queries, resides=True) for x in resident),
            *(spec(x, is_query=not by_queries, resides=False) for x in streaming),
        ],
        out_specs=[spec(x, is_query=by_queries, resides=True) for x in out_type],
        out_type=out_type, scratch=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        interpret=plan.interpret,
    )  # fmt: skip
