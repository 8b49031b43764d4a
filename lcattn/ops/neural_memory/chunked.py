"""The form that runs anywhere: chunk by chunk, in matrix products over the tokens of each."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lcattn.ops.chunks import cut, einsum, paste
from lcattn.ops.neural_memory.coefficients import Coefficients, coefficients
from lcattn.ops.neural_memory.network import Surprise, Weights, surprise
from lcattn.ops.neural_memory.state import NeuralMemoryState, select
from lcattn.ops.neural_memory.windows import Windows, lay_out
from lcattn.typing import Array


class Tokens(NamedTuple):
    """Queries `[B,T,M,G,F]`, keys `[B,T,M,F]`, values `[B,T,M,H]` and gates `[B,T,M]`."""

    q: Array
    k: Array
    v: Array
    learning_rate: Array
    momentum: Array
    decay: Array


class Memory(NamedTuple):
    """Weights and momentum of each layer, `[B,M,in,out]`."""

    weights: Weights
    momentum: Weights


def attend(
    tokens: Tokens,
    state: NeuralMemoryState | None,
    fresh: NeuralMemoryState,
    *,
    segment_ids: Array | None,
    chunk: int,
    activate: Callable[[Array], Array],
) -> tuple[Array, NeuralMemoryState]:
    """Outputs `[B,T,M,G,H]` and the state after the last token.

    `fresh` is what documents start with, `state` what the first of each row continues, if any.
    """
    if state is None and segment_ids is None:
        return _aligned(tokens, fresh, chunk, activate)
    position = None if state is None else state.position
    windows = lay_out(segment_ids, position, tokens.decay.shape, chunk)
    return windowed(tokens, state or fresh, fresh, windows, activate)


def _aligned(
    tokens: Tokens, fresh: NeuralMemoryState, chunk: int, activate: Callable[[Array], Array]
) -> tuple[Array, NeuralMemoryState]:
    """Sequences from their start: whole chunks, then the rest. Nothing is masked."""

    @jax.checkpoint  # keep the memory before each chunk, and the inputs
    def step(memory, window):
        q, k, v, coefs = window
        return _advance(memory, memory.weights, q, k, v, coefs, activate)

    memory, anchor = Memory(fresh.weights, fresh.momentum), fresh.weights
    length, outs = tokens.q.shape[1], []
    whole = length - length % chunk
    for start, end, size in ((0, whole, chunk), (whole, length, length - whole)):
        if start < end:
            anchor = memory.weights
            q, k, v, *gates = _chunks(Tokens(*(x[:, start:end] for x in tokens)), size)
            window = (q, k, v, jax.checkpoint(coefficients)(*gates))
            memory, out = lax.scan(step, memory, window)
            outs.append(paste(out, end - start))
    if whole == length:
        anchor = memory.weights
    state = NeuralMemoryState(*memory, anchor, fresh.position + length % chunk)
    return jnp.concatenate(outs, axis=1), state


def windowed(
    tokens: Tokens,
    state: NeuralMemoryState,
    fresh: NeuralMemoryState,
    windows: Windows,
    activate: Callable[[Array], Array],
) -> tuple[Array, NeuralMemoryState]:
    """Streams and packed documents: each chunk in a window of slots, some of them empty."""
    q, k, v, *gates = _chunks(Tokens(*map(windows.gather, tokens)), windows.used.shape[-1])
    used, first = windows.used[:, :, None], windows.first[:, :, None]
    coefs = jax.checkpoint(coefficients)(*gates, used=used, first=first)

    @jax.checkpoint
    def step(carry, window):
        return lax.cond(jnp.any(window[-1]), advance, skip, carry, window)

    def skip(carry, window):
        q, _, v, *_ = window
        return carry, 0 * (q[..., :1] + v[:, :, None]).astype(carry[1][0].dtype)

    def advance(carry, window):
        memory, anchor = carry
        q, k, v, coefs, starts_document, starts_chunk, _ = window
        memory = select(starts_document, Memory(fresh.weights, fresh.momentum), memory)
        anchor = select(starts_chunk, memory.weights, anchor)
        memory, out = _advance(memory, anchor, q, k, v, coefs, activate)
        return (memory, anchor), out

    start = (Memory(state.weights, state.momentum), state.anchor)
    window = (q, k, v, coefs, windows.starts_document, windows.starts_chunk, windows.used)
    (memory, anchor), out = lax.scan(step, start, window)
    anchor = select(windows.position == 0, memory.weights, anchor)
    out = windows.scatter(paste(out, windows.tokens.shape[1]))
    return out, NeuralMemoryState(*memory, anchor, windows.position)


def _advance(
    memory: Memory,
    anchor: Weights,
    q: Array,
    k: Array,
    v: Array,
    coefs: Coefficients,
    activate: Callable[[Array], Array],
) -> tuple[Memory, Array]:
    """One chunk: its outputs, and the memory after it."""
    gradients = surprise(k, v, anchor, activate)
    out = _read(q, memory, gradients, coefs, activate)
    return _write(memory, gradients, coefs, like=k), out


def _read(
    q: Array,
    memory: Memory,
    gradients: Surprise,
    coefs: Coefficients,
    activate: Callable[[Array], Array],
) -> Array:
    """Every query `[B,M,G,C,F]` through the weights at its own token, which are never formed."""
    kept, carried = (x[:, :, None, :, None] for x in (coefs.kept, coefs.carried))
    written = coefs.written[:, :, None]
    x = q
    for layer, parts in enumerate(zip(*memory, *gradients, strict=True)):
        weights, momentum, inputs, errors = parts
        if layer:
            x = activate(x)
        scores = written * einsum("...gtf,...sf->...gts", x, inputs, like=q)
        x = (
            kept * einsum("...gtf,...fh->...gth", x, weights, like=q)
            + carried * einsum("...gtf,...fh->...gth", x, momentum, like=q)
            - einsum("...gts,...sh->...gth", scores, errors, like=q)
        )
    return x


def _write(memory: Memory, gradients: Surprise, coefs: Coefficients, *, like: Array) -> Memory:
    kept, carried, left = (
        x[..., None, None] for x in (coefs.kept[..., -1], coefs.carried[..., -1], coefs.momentum)
    )
    weights, momentum = [], []
    for w, s, inputs, errors in zip(*memory, *gradients, strict=True):
        written, pending = (
            einsum("...tf,...th->...fh", share[..., None] * inputs, errors, like=like)
            for share in (coefs.written[..., -1, :], coefs.pending)
        )
        weights.append(kept * w + carried * s - written)
        momentum.append(left * s - pending)
    return Memory(tuple(weights), tuple(momentum))


def _chunks(tokens: Tokens, chunk: int) -> list[Array]:
    """Queries `[n,B,M,G,C,F]`, keys and values `[n,B,M,C,F]`, gates `[n,B,M,C]`."""
    q, k, v, *gates = tokens
    cut_gates = (cut(gate[..., None], chunk)[..., 0] for gate in gates)
    return [cut(q, chunk), cut(k, chunk), cut(v, chunk), *cut_gates]
