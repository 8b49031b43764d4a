"""The definition itself, and JAX's own attention function with all scores in memory."""

import jax
import jax.numpy as jnp

from lcattn.ops.checks import accumulation_dtype
from lcattn.ops.masked_softmax import masked_softmax
from lcattn.ops.softmax_attention.alibi import Alibi
from lcattn.ops.visibility import Visibility
from lcattn.typing import Array


def reference(
    q, k, v, *, visibility: Visibility, alibi: Alibi | None, scale: float, **rest
) -> tuple[Array, Array]:
    """The formula of the docstring, term by term; materialises T·S scores."""
    del rest
    N, K = q.shape[2], k.shape[2]
    dtype = accumulation_dtype(q.dtype)
    k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    scores = scale * jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=dtype)
    if alibi is not None:
        scores += alibi.bias()
    probabilities, lse = masked_softmax(scores, visibility.mask()[:, None])
    out = jnp.einsum("bnts,bsnh->btnh", probabilities, v, preferred_element_type=dtype)
    return out.astype(q.dtype), lse.transpose(0, 2, 1)


def materialized(
    q, k, v, *, visibility: Visibility, alibi: Alibi | None, scale: float, causal: bool,
    window: int | None, is_plain: bool,
) -> Array:  # fmt: skip
    """`jax.nn.dot_product_attention` with the mask spelled out; for short sequences."""
    if is_plain and q.shape[1] == k.shape[1] and alibi is None:
        reach = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=causal, local_window_size=reach, implementation="xla"
        )
    seen = visibility.mask()[:, None]
    bias = None if alibi is None else alibi.bias()[None]
    out = jax.nn.dot_product_attention(
        q, k, v, bias=bias, mask=seen, scale=scale, implementation="xla"
    )
    # JAX averages all values where no key is seen; the contract says zeros.
    empty = ~jnp.any(seen, axis=-1)[:, 0, :, None, None]
    return jnp.where(empty, 0, out)
