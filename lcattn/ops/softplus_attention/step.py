"""One query: its scores are few, so keys and values are read once each, and nothing else counts.

As matrix products of each head, XLA would move the whole cache first, `[B,S,K,H]` to `[B,K,S,H]`,
and keys once more to divide them by their norms. So all heads are one product with all keys or
values, of which each head's own block is wanted: FLOPs are free where bytes are the limit. With
keys of its own, a head's dots are a product and a sum instead, which fuse with the norms of keys.
"""

import jax
import jax.numpy as jnp
from jax import lax

from lcattn.ops import dispatch
from lcattn.ops.checks import Sizes
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
    norms = squared_norm(k)[..., 0].swapaxes(1, 2)
    dots = _dots(unit(q).reshape(B, K, N // K, F), k)
    cosines = (dots * lax.rsqrt(norms)[:, :, None]).reshape(B, N, 1, S)
    p = probabilities(cosines, rows, visibility, reweighting)
    return _mixed(p[:, :, 0], v).reshape(B, 1, N, H).astype(q.dtype)


def _dots(q: Float[Array, "B K G F"], k: Float[Array, "B S K F"]) -> Float[Array, "B K G S"]:
    if q.shape[2] == 1:
        return jnp.sum(q[:, None, :, 0] * k.astype(q.dtype), axis=-1).swapaxes(1, 2)[:, :, None]
    own = q[:, :, :, None] * jnp.eye(k.shape[2], dtype=q.dtype)[:, None, :, None]
    return jnp.einsum("bkgjf,bsjf->bkgs", own.astype(k.dtype), k, preferred_element_type=q.dtype)


def _mixed(p: Float[Array, "B N S"], v: Float[Array, "B S K H"]) -> Float[Array, "B K G H"]:
    (B, N, _), (K, H) = p.shape, v.shape[2:]
    out = jnp.einsum("bns,bsjh->bnjh", p.astype(v.dtype), v, preferred_element_type=p.dtype)
    return jnp.einsum("bkgkh->bkgh", out.reshape(B, K, N // K, K, H))


def pays(**call) -> bool:
    """Whether it is the better choice: on a GPU, and only where all heads lie on one device."""
    del call
    return dispatch.default_platform() == "gpu" and jax.device_count() == 1


def objection(*, sizes: Sizes, **call) -> str | None:
    """Why it cannot serve a call, or None."""
    del call
    return None if sizes.T == 1 else f"takes one query, not T={sizes.T}"
