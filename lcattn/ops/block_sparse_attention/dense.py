"""The definition: one softmax under a mask of all pairs."""

import jax.numpy as jnp

from lcattn.ops.block_sparse_attention.plan import BlockPlan
from lcattn.ops.block_sparse_attention.tiles import spread
from lcattn.ops.checks import accumulation_dtype
from lcattn.ops.masked_softmax import masked_softmax
from lcattn.typing import Array


def reference(
    q: Array, k: Array, v: Array, plan: BlockPlan, *, scale: float
) -> tuple[Array, Array]:
    """The formula of the docstring, term by term; materialises T·S scores."""
    dtype = accumulation_dtype(q.dtype)
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = scale * jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=dtype)
    added = spread(plan.weights(), *scores.shape[:2]).astype(dtype)
    seen = ~jnp.isneginf(added)
    probabilities, lse = masked_softmax(scores + jnp.where(seen, added, 0), seen)
    out = jnp.einsum("bnts,bsnh->btnh", probabilities, v, preferred_element_type=dtype)
    return out.astype(q.dtype), lse.transpose(0, 2, 1)
