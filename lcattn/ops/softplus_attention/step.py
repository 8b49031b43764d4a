"""One query: its scores are few, so keys and values are read once each, and nothing else counts.

As matrix products of each head, XLA would move the whole cache first, `[B,S,K,H]` to `[B,K,S,H]`,
and keys once more to divide them by their norms. So all heads are one product with all keys or
values, of which each head's own block is wanted: FLOPs are free where bytes are the limit. Heads
with keys of their own are a product and a sum instead, which fuse with the norms of keys.
"""

import jax.numpy as jnp
from jax import lax

from lcattn.ops.checks import Sizes, accumulation_dtype
from lcattn.ops.softplus_attention.dense import probabilities
from lcattn.ops.softplus_attention.rows import Reweighting, Rows, squared_norm, unit
from lcattn.ops.visibility import Visibility
from lcattn.typing import Array, Float


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
    (B, _, N, F), (_, S, K, H) = q.shape, v.shape
    dtype = accumulation_dtype(q.dtype)
    dots = _dots(unit(q).reshape(B, K, N // K, F), k.astype(dtype))
    cosines = (dots * lax.rsqrt(squared_norm(k))).reshape(B, S, N, 1).transpose(0, 2, 3, 1)
    p = probabilities(cosines, rows, visibility, reweighting)
    p = p[:, :, 0].reshape(B, K, N // K, S).transpose(0, 3, 1, 2)
    return _mixed(p, v.astype(dtype)).reshape(B, 1, N, H).astype(q.dtype)


def _dots(q: Float[Array, "B K G F"], k: Float[Array, "B S K F"]) -> Float[Array, "B S K G"]:
    if q.shape[2] == 1:
        return jnp.sum(q[:, None] * k[:, :, :, None], axis=-1)
    own = jnp.eye(k.shape[2], dtype=q.dtype)
    return jnp.einsum("bkgjf,bsjf->bskg", q[:, :, :, None] * own[:, None, :, None], k)


def _mixed(p: Float[Array, "B S K G"], v: Float[Array, "B S K H"]) -> Float[Array, "B K G H"]:
    return jnp.einsum("bkgkh->bkgh", jnp.einsum("bskg,bsjh->bkgjh", p, v))


def objection(*, sizes: Sizes, **call) -> str | None:
    """Why it cannot serve a call, or None."""
    del call
    return None if sizes.T == 1 else f"takes one query, not T={sizes.T}"
