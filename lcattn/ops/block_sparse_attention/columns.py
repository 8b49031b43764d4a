"""The single keys of a plan: gathered for each block of queries, a few blocks at a time."""

import jax
import jax.numpy as jnp
from jax import lax

from lcattn.ops.block_sparse_attention.plan import BlockPlan
from lcattn.ops.block_sparse_attention.rows import Layout, take
from lcattn.ops.checks import accumulation_dtype
from lcattn.ops.masked_softmax import masked_softmax
from lcattn.ops.visibility import sees
from lcattn.typing import Array


def attend(q: Array, k: Array, v: Array, plan: BlockPlan, *, scale: float) -> tuple[Array, Array]:
    """Outputs `[B,T,N,H]` and log-sum-exps `[B,T,N]` over the columns.

    The backward pass gathers again, so that gathered keys are never kept.
    """
    layout = Layout.of(plan, q.shape[2], k.shape[2])
    dtype, batch = accumulation_dtype(q.dtype), len(q)
    # Gradients of keys that many blocks share are summed in `dtype`.
    keys, values = (jnp.moveaxis(x, 1, 2).astype(dtype) for x in (k, v))
    lists = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), plan.columns)
    seen = plan.seen

    @jax.checkpoint
    def turn(keys, values, part):
        q, positions, (columns, count, log_weight) = part
        index = layout.spread(columns, batch)
        x = scale * jnp.einsum(
            "...rf,...cf->...rc", q, take(keys, index).astype(q.dtype),
            preferred_element_type=dtype,
        )  # fmt: skip
        if log_weight is not None:
            x += layout.spread(lax.stop_gradient(log_weight), batch)[..., None, :].astype(dtype)
        places = jnp.arange(columns.shape[-1], dtype=jnp.int32)
        is_listed = layout.spread(places < count[..., None], batch)[..., None, :]
        position = layout.spread(positions, batch)[..., None]
        begin, end = (take(edge, index)[..., None, :] for edge in seen[1:])
        weights, lse = masked_softmax(x, is_listed & sees(position, begin, end))
        out = jnp.einsum(
            "...rc,...ch->...rh", weights.astype(v.dtype), take(values, index).astype(v.dtype),
            preferred_element_type=dtype,
        )  # fmt: skip
        return out, lse

    rows = layout.rows(q)
    parts = jax.tree.map(layout.turns, (rows, layout.positions(seen.queries), lists))
    _, results = lax.scan(lambda _, part: (None, turn(keys, values, part)), None, parts)
    out, lse = (layout.unrows(layout.unturns(x, len(rows))) for x in results)
    return out, lse
