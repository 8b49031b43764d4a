"""The definition, token by token; every token has weights of its own."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from lcattn.ops.neural_memory.chunked import Tokens
from lcattn.ops.neural_memory.state import NeuralMemoryState, select, spread
from lcattn.ops.segments import owners
from lcattn.typing import Array


def attend(
    tokens: Tokens,
    state: NeuralMemoryState | None,
    fresh: NeuralMemoryState,
    *,
    segment_ids: Array | None,
    chunk: int,
    activate: Callable[[Array], Array],
) -> tuple[Array, NeuralMemoryState]:
    """As `chunked.attend`."""
    dtype = fresh.weights[0].dtype
    ids = segment_ids
    if ids is None:
        ids = jnp.zeros(tokens.q.shape[:2], jnp.int32)
    before, after = owners(ids.T[:, :, None])

    def network(x, weights):
        for layer in weights[:-1]:
            x = activate(jnp.einsum("bm...f,bmfh->bm...h", x, layer))
        return jnp.einsum("bm...f,bmfh->bm...h", x, weights[-1])

    def loss(weights, k, v):
        return jnp.sum((network(k, weights) - v) ** 2)

    def step(state, token):
        token, is_new, is_real = token
        state = select(is_new, fresh, state)
        anchor = select(state.position == 0, state.weights, state.anchor)
        gradients = jax.grad(loss)(anchor, token.k, token.v)
        momentum = tuple(
            spread(token.momentum, s) * s - spread(token.learning_rate, g) * g
            for s, g in zip(state.momentum, gradients, strict=True)
        )
        weights = tuple(
            (1 - spread(token.decay, w)) * w + s
            for w, s in zip(state.weights, momentum, strict=True)
        )
        position = (state.position + 1) % chunk
        anchor = select(position == 0, weights, anchor)
        state = select(is_real, NeuralMemoryState(weights, momentum, anchor, position), state)
        return state, network(token.q, state.weights)

    by_token = Tokens(*(jnp.moveaxis(x, 1, 0).astype(dtype) for x in tokens))
    state, out = lax.scan(step, state or fresh, (by_token, before != after, ids.T >= 0))
    return jnp.moveaxis(out, 0, 1), state
