"""One query: its scores are few, so keys and values are read once each, and nothing else counts."""

import jax.numpy as jnp
from jax import lax

from lcattn.ops.checks import Sizes, accumulation_dtype
from lcattn.ops.softplus_attention.dense import probabilities
from lcattn.ops.softplus_attention.rows import Reweighting, Rows, squared_norm, unit
from lcattn.ops.visibility import Visibility
from lcattn.typing import Array


def attend(
    q: Array,
    k: Array,
    v: Array,
    rows: Rows,
    visibility: Visibility,
    reweighting: Reweighting | None,
    *,
    is_packed: bool,
) -> Array:
    """Attention of one query a row."""
    del is_packed
    (B, _, N, _), (_, S, K, H) = q.shape, v.shape
    dtype = accumulation_dtype(q.dtype)
    queries = unit(q).reshape(B, 1, K, N // K, -1)
    # Products and sums, which fuse: a matrix product would want unit keys in memory first.
    dots = jnp.sum(queries * k[:, :, :, None].astype(dtype), axis=-1)
    cosines = dots * lax.rsqrt(squared_norm(k))
    p = probabilities(
        cosines.reshape(B, S, N, 1).transpose(0, 2, 3, 1), rows, visibility, reweighting
    )
    weights = p[:, :, 0].reshape(B, K, N // K, S).transpose(0, 3, 1, 2)
    out = jnp.sum(weights[..., None] * v[:, :, :, None].astype(dtype), axis=1)
    return out.reshape(B, 1, N, H).astype(q.dtype)


def objection(*, sizes: Sizes, **call) -> str | None:
    """Why it cannot serve a call, or None."""
    del call
    return None if sizes.T == 1 else f"takes one query, not T={sizes.T}"
