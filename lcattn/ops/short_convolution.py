"""The short causal convolution that hybrids put between their attention layers."""

import jax
import jax.numpy as jnp
from jax import lax

from lcattn.errors import argument_error
from lcattn.ops import checks, dispatch, sharding
from lcattn.ops.segments import owners
from lcattn.typing import Array, Float, SegmentIds


@sharding.partitioned
def short_convolution(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D W"],
    *,
    segment_ids: SegmentIds | None = None,
    initial_state: Float[Array, "B w D"] | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], Float[Array, "B w D"]]:
    r"""Depth-wise causal convolution over the last W tokens of a document.

    Layout `[B,T,D]`; products and sums in float32, output and state in the dtype of `x`.

    .. math::
        y_{t,d} = \sum_{i=0}^{W-1} \mathrm{weight}_{d,i} \; x_{t-(W-1)+i,\,d}

    so the last tap weighs the token itself. Tokens before the document count as zeros.

    Args:
      x: inputs `[B,T,D]`.
      weight: taps of each channel `[D,W]`, oldest first.
      segment_ids: document of each token `[B,T]`, for packed rows.
      initial_state: the W-1 inputs before the first `[B,W-1,D]`, zeros where there were none; they
        belong to the first document of each row.
      return_state: also return the last W-1 inputs of the last document.
      implementation: "xla" (W shifted products), "reference" (token by token), or None.

    Returns:
      `[B,T,D]`, or that and the final state.

    Raises:
      ValueError: for arguments that do not fit.
    """
    if x.ndim != 3 or 0 in x.shape[1:]:
        raise argument_error("x", "3 axes [B,T,D], none but B empty", f"shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise argument_error("x", "a floating-point dtype", x.dtype)
    B, T, D = x.shape
    if weight.ndim != 2 or weight.shape[0] != D or weight.shape[1] < 1:
        raise argument_error("weight", f"shape [D,W] with D={D}", f"shape {weight.shape}")
    if segment_ids is not None:
        checks.check_segment_ids(segment_ids, (B, T))
    past = weight.shape[1] - 1
    if initial_state is None:
        initial_state = jnp.zeros_like(x[:, :1], shape=(B, past, D))
    checks.check_shape("initial_state", initial_state, (B, past, D), "[B,W-1,D]")

    run = dispatch.choose("short_convolution", implementation)
    window = jnp.concatenate([initial_state.astype(x.dtype), x], axis=1)
    ids = _window_ids(segment_ids, past)
    y = run(window, weight, ids).astype(x.dtype)
    if not return_state:
        return y
    state = window[:, T:]
    if segment_ids is not None and ids is not None:
        _, last = owners(segment_ids[None])
        state = jnp.where(ids[:, T:, None] == last[0][:, None, None], state, 0)
    return y, state


def _window_ids(segment_ids: Array | None, past: int) -> Array | None:
    """Ids of the inputs before the first token and of the tokens themselves."""
    if segment_ids is None:
        return None
    first, _ = owners(segment_ids[None])
    before = jnp.broadcast_to(first[0][:, None], (segment_ids.shape[0], past))
    return jnp.concatenate([before, segment_ids], axis=1)


def _shifted_products(window: Array, weight: Array, ids: Array | None) -> Array:
    dtype = checks.accumulation_dtype(window.dtype)
    W = weight.shape[1]
    T = window.shape[1] - W + 1

    def tap(i: int) -> Array:
        product = weight[:, i].astype(dtype) * window[:, i : i + T].astype(dtype)
        if ids is None:
            return product
        own = ids[:, W - 1 :]
        return jnp.where(((ids[:, i : i + T] == own) & (own >= 0))[..., None], product, 0)

    return sum((tap(i) for i in range(1, W)), start=tap(0))


def _token_by_token(window: Array, weight: Array, ids: Array | None) -> Array:
    dtype = checks.accumulation_dtype(window.dtype)
    W = weight.shape[1]
    if ids is None:
        ids = jnp.zeros(window.shape[:2], jnp.int32)

    def token(t):
        inputs = lax.dynamic_slice_in_dim(window, t, W, axis=1).astype(dtype)
        seen = lax.dynamic_slice_in_dim(ids, t, W, axis=1)
        seen = (seen == seen[:, -1:]) & (seen[:, -1:] >= 0)
        return jnp.einsum("bwd,dw->bd", jnp.where(seen[..., None], inputs, 0), weight.astype(dtype))

    return jax.vmap(token, out_axes=1)(jnp.arange(window.shape[1] - W + 1))


dispatch.declare(
    "short_convolution",
    {
        "xla": dispatch.Implementation(_shifted_products),
        "reference": dispatch.Implementation(_token_by_token),
    },
)
