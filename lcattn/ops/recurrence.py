"""What recurrent ops with gates share around their recurrence: heads, states, documents.

A gate belongs to a state. Where there are fewer key heads than query heads (K < N), gates of K
heads give K states, each read by a group of N/K queries; gates of N heads give every query head a
state of its own, of shared keys and values. M stands for the number of states.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from lcattn.errors import argument_error
from lcattn.ops import checks
from lcattn.ops.chunks import einsum
from lcattn.typing import Array, Float

_CHUNK = 64


def check_arrays(
    q: Array, k: Array, v: Array, segment_ids: Array | None, *, causal: bool
) -> checks.Sizes:
    """Checks queries, keys and values of an op that exists in causal form only."""
    sizes = checks.check_heads(q, k, v, segment_ids)
    if not causal:
        raise argument_error(
            "causal", "True: a state that forgets has a direction (for both, add a call on"
            " flipped inputs)", causal,
        )  # fmt: skip
    if sizes.T != sizes.S:
        raise argument_error("q", f"T={sizes.S} queries, as many as keys", sizes.T)
    return sizes


def group_by_state(q: Array, k: Array, v: Array, states: int) -> tuple[Array, Array, Array]:
    """Queries `[B,T,M,G,F]`, keys and values `[B,T,M,F]` and `[B,T,M,H]` of each state."""
    B, T, N, F = q.shape
    shared = states // k.shape[2]
    k, v = (jnp.repeat(x, shared, axis=2) for x in (k, v))
    return q.reshape(B, T, states, N // states, F), k, v


def start(state: Array | None, k: Array, v: Array) -> Float[Array, "B M F H"]:
    """The initial state, checked, in float32; zeros by default."""
    # A product with zero, so that the state varies over a mesh just as k and v do; whose gradient
    # would be one more pass over all of k and v.
    first = (lax.stop_gradient(x[:, 0]) for x in (k, v))
    zeros = 0 * einsum("bmf,bmh->bmfh", *first, like=v)
    if state is None:
        return zeros
    checks.check_shape("initial_state", state, zeros.shape, "[B,M,F,H]")
    return state.astype(zeros.dtype)


def finish(out: Array, segment_ids: Array | None, dtype: DTypeLike) -> Float[Array, "B T N H"]:
    """Outputs of all heads, zero at padding."""
    B, T, M, G, H = out.shape
    out = out.reshape(B, T, M * G, H)
    if segment_ids is not None:
        out = jnp.where((segment_ids >= 0)[:, :, None, None], out, 0)
    return out.astype(dtype)


def chunk_length(chunk_size: int | None, length: int) -> int:
    """Tokens a chunk: a power of two, no longer than it takes to hold the sequence."""
    if chunk_size is not None:
        checks.check_size("chunk_size", chunk_size)
    return 1 << (min(chunk_size or _CHUNK, length) - 1).bit_length()


def token_by_token(
    step: Callable[..., tuple[Array, Array]], state: Array, *arrays: Array
) -> tuple[Array, Array]:
    """Runs `state, out = step(state, *token)` over arrays `[B,T,...]`, in the state's dtype."""
    tokens = tuple(jnp.moveaxis(x, 1, 0).astype(state.dtype) for x in arrays)
    state, out = lax.scan(lambda state, token: step(state, *token), state, tokens)
    return jnp.moveaxis(out, 0, 1), state
