"""The definition, term by term."""

import jax
import jax.numpy as jnp
from jax import lax

from lcattn.ops.checks import accumulation_dtype
from lcattn.ops.softplus_attention.rows import Reweighting, Rows, unit
from lcattn.ops.visibility import Visibility
from lcattn.typing import Array


def reference(
    q: Array,
    k: Array,
    v: Array,
    rows: Rows,
    visibility: Visibility,
    reweighting: Reweighting | None,
    *,
    is_packed: bool,
) -> Array:
    """The formulas of the docstring; materialises T·S weights."""
    del is_packed
    q, k = (unit(x).astype(x.dtype) for x in (q, k))
    dtype = accumulation_dtype(q.dtype)
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    cosines = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=dtype)
    p = probabilities(cosines, rows, visibility, reweighting)
    out = jnp.einsum("bnts,bsnh->btnh", p, v, preferred_element_type=dtype)
    return out.astype(q.dtype)


def probabilities(
    cosines: Array, rows: Rows, visibility: Visibility, reweighting: Reweighting | None
) -> Array:
    """The weights P or A of every value, `[B,N,T,S]`, from cosines."""
    rows = Rows(*(x[:, None] for x in rows))
    seen = visibility.mask()[:, None]
    weights = jnp.where(seen, jax.nn.softplus(rows.length_scale[..., None] * cosines), 0)
    total = weights.sum(axis=-1)
    total = jnp.where(total == 0, 1, total)
    if reweighting is None:
        return weights / total[..., None]
    excess = reweighting.excess(weights, total, rows)
    # The maximum cancels, so no gradient flows through it.
    highest = lax.stop_gradient(excess.max(axis=-1))
    flat = reweighting.is_flat(highest)
    raised = reweighting.raised(excess / jnp.where(flat, 1, highest)[..., None])
    raised_total = jnp.where(flat, 1, raised.sum(axis=-1))
    flat, raised_total, total = (x[..., None] for x in (flat, raised_total, total))
    return jnp.where(flat, weights / total, raised / raised_total)
