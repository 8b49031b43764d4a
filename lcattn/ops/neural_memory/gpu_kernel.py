"""The kernels for Hopper GPUs, behind the op's contract."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp

from lcattn.ops import dispatch
from lcattn.ops.checks import Sizes
from lcattn.ops.neural_memory import chunked
from lcattn.ops.neural_memory.chunked import Tokens
from lcattn.ops.neural_memory.network import Activation, name_of
from lcattn.ops.neural_memory.state import NeuralMemoryState, select
from lcattn.ops.neural_memory.windows import Windows, lay_out
from lcattn.typing import Array

_PAYS_FROM = 300
"""Tokens from which on the kernels are chosen unasked: the fewest that were timed."""


def attend(
    tokens: Tokens,
    state: NeuralMemoryState | None,
    fresh: NeuralMemoryState,
    *,
    segment_ids: Array | None,
    chunk: int,
    activate: Callable[[Array], Array],
) -> tuple[Array, NeuralMemoryState]:
    """As `chunked.attend`, of a call that `objection` lets pass."""
    if state is None and segment_ids is None:
        return _aligned(tokens, fresh, chunk, activate)
    position = None if state is None else state.position
    windows = lay_out(segment_ids, position, tokens.decay.shape, chunk)
    if state is None:
        return _windowed(tokens, fresh, fresh, windows, activate)
    # The kernels take gradients at the network before a window. One that goes on with a chunk of
    # the calls before has them taken elsewhere: it can only be the first, and is XLA's.
    first, windows = windows.split()
    begun, state = chunked.windowed(tokens, state, fresh, first, activate)
    out, state = _windowed(tokens, state, fresh, windows, activate)
    return out + begun.astype(out.dtype), state


def _aligned(
    tokens: Tokens, fresh: NeuralMemoryState, chunk: int, activate: Callable[[Array], Array]
) -> tuple[Array, NeuralMemoryState]:
    """Sequences from their start; the rest of a chunk is XLA's."""
    from pallas_kernels.neural_memory import mosaic_gpu
    from pallas_kernels.neural_memory.gpu_gates import Gates

    length = tokens.q.shape[1]
    whole = length - length % chunk
    q, k, v, *gates = (x[:, :whole] for x in tokens)
    out, weights, momentum, _ = mosaic_gpu.neural_memory(
        q, k, v, Gates(*_by_chunk(gates, chunk)), fresh.weights, fresh.momentum,
        activation=name_of(activate),
    )  # fmt: skip
    state = NeuralMemoryState(weights, momentum, weights, fresh.position)
    if whole == length:
        return out, state
    rest, state = chunked.attend(
        Tokens(*(x[:, whole:] for x in tokens)), None, state,
        segment_ids=None, chunk=chunk, activate=activate,
    )  # fmt: skip
    return jnp.concatenate([out, rest.astype(out.dtype)], axis=1), state


def _windowed(
    tokens: Tokens,
    state: NeuralMemoryState,
    fresh: NeuralMemoryState,
    windows: Windows,
    activate: Callable[[Array], Array],
) -> tuple[Array, NeuralMemoryState]:
    """Streams and packed documents, where every window begins with a chunk."""
    from pallas_kernels.neural_memory import mosaic_gpu
    from pallas_kernels.neural_memory.gpu_gates import Gates
    from pallas_kernels.neural_memory.gpu_plan import Course

    start = select(windows.starts_document[0], fresh, state)
    number = windows.used.any(axis=2).sum(axis=0, dtype=jnp.int32)
    last = jnp.maximum(number - 1, 0)
    renews = jnp.pad(windows.starts_document[1:], ((0, 1), (0, 0))).T.astype(jnp.int32)
    q, k, v, *gates = map(windows.gather, tokens)
    used, first = (x.swapaxes(0, 1)[:, None] for x in (windows.used, windows.first))
    out, weights, momentum, networks = mosaic_gpu.neural_memory(
        q, k, v, Gates(*_by_chunk(gates, used.shape[-1]), used=used, first=first),
        start.weights, start.momentum, Course(last + 1, renews, fresh.weights),
        activation=name_of(activate),
    )  # fmt: skip
    # An anchor is but an operand of products, for which the networks before chunks are rounded.
    rows = jnp.arange(len(last))
    anchor = tuple(x[rows, :, last].astype(w.dtype) for x, w in zip(networks, weights, strict=True))
    anchor = select(number > 0, anchor, state.anchor)
    anchor = select(windows.position == 0, weights, anchor)
    return windows.scatter(out), NeuralMemoryState(weights, momentum, anchor, windows.position)


def _by_chunk(gates: Sequence[Array], chunk: int) -> list[Array]:
    """`[B,T,M] -> [B,M,n,C]`."""
    return [x.reshape(x.shape[0], -1, chunk, x.shape[2]).transpose(0, 3, 1, 2) for x in gates]


def objection(
    *,
    sizes: Sizes,
    dtype: jnp.dtype,
    weights: Sequence[Array],
    chunk: int,
    activation: Activation,
    **other,
) -> str | None:
    """Why the kernels cannot serve a call, in words."""
    del other
    if not isinstance(activation, str):
        return "knows no activation but those with names"
    # Imported where it can run: it takes longer to import than the rest of the ops.
    from pallas_kernels.neural_memory import mosaic_gpu

    return mosaic_gpu.objection(
        dtype=dtype, length=sizes.T, chunk=chunk,
        sizes=(sizes.F, *(x.shape[-1] for x in weights)),
    ) or dispatch.no_grid(sizes.B)  # fmt: skip


def pays(*, sizes: Sizes, **call) -> bool:
    """Whether the kernels are the better choice where they can serve, as an H200 found.

    There they took at most half the time: keys of 64 and 128, one layer and two, one document a
    row and several. Streams go on as packed documents do, after a window of XLA's.
    """
    del call
    return sizes.T >= _PAYS_FROM and dispatch.on_one_device()
