"""cuDNN's fused kernels through JAX: whole sequences, and one token against a cache."""

import functools

import jax
import jax.numpy as jnp

from lcattn.ops import dispatch
from lcattn.ops.checks import Sizes
from lcattn.ops.softmax_attention import chunked
from lcattn.ops.visibility import Visibility
from lcattn.typing import Array


def attend(
    q, k, v, *, visibility: Visibility, causal: bool, window: int | None, scale: float, **rest
) -> tuple[Array, None]:
    """Attention, of a call that `objection` lets pass."""
    del rest
    if causal and q.shape[1] == 1:
        return _decode(scale, q, k, v, visibility), None
    reach = None if window is None else (window - 1, 0)

    def fused(q, k, v):
        return jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=causal, local_window_size=reach, implementation="cudnn"
        )

    return fused(q, k, v), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decode(scale: float, q: Array, k: Array, v: Array, visibility: Visibility) -> Array:
    """One token against the keys up to its position."""
    lengths = jnp.clip(visibility.queries[:, 0] + 1, 0, k.shape[1])
    lengths = jnp.broadcast_to(lengths, q.shape[:1])
    out = jax.nn.dot_product_attention(
        q, k, v, scale=scale, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return jnp.where(lengths[:, None, None, None] == 0, 0, out)


def _decode_forward(scale, q, k, v, visibility):
    return _decode(scale, q, k, v, visibility), (q, k, v, visibility)


def _decode_backward(scale, residuals, g):
    # cuDNN has no gradient for one query.
    q, k, v, visibility = residuals
    _, pull = jax.vjp(lambda q, k, v: chunked.attend(q, k, v, visibility, scale=scale)[0], q, k, v)
    return *pull(g), None


_decode.defvjp(_decode_forward, _decode_backward)


def objection(
    *,
    sizes: Sizes,
    dtype: jnp.dtype,
    causal: bool,
    segment_ids: Array | None,
    alibi_slopes: Array | None,
    window: int | None,
    sinks: int,
    has_all_keys: bool,
    is_aligned: bool,
    return_lse: bool,
) -> str | None:
    """Why cuDNN cannot serve a call, or None."""
    if dispatch.default_platform() != "gpu":
        return f"needs a GPU; computations run on {dispatch.default_platform()!r} here"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 or float16, not {dtype}"
    if segment_ids is not None or alibi_slopes is not None:
        return "takes neither segment_ids nor alibi_slopes without materialising a T·S bias"
    if sinks:
        return "has windows without sinks only"
    if return_lse:
        return "has no gradient through the log-sum-exp"
    if sizes.F != sizes.H or sizes.H > 128 or sizes.H % 8:
        return f"takes one head size, a multiple of 8 up to 128, not {sizes.F} and {sizes.H}"
    if causal and sizes.T == 1:
        decodes = has_all_keys and window is None
        return None if decodes else "decodes from a cache that begins with the first token"
    if not is_aligned or (causal and sizes.T != sizes.S):
        return "masks causally only where queries and keys are the same tokens"
    if sizes.T % 2 or sizes.S % 2:
        return f"has no gradient for odd lengths such as T={sizes.T}, S={sizes.S}"
    return None
