"""The kernels for Hopper GPUs, behind the op's contract."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lcattn.ops import dispatch
from lcattn.ops.checks import Sizes
from lcattn.ops.neural_memory import chunked
from lcattn.ops.neural_memory.chunked import Tokens
from lcattn.ops.neural_memory.coefficients import coefficients
from lcattn.ops.neural_memory.network import Activation, name_of
from lcattn.ops.neural_memory.state import NeuralMemoryState
from lcattn.typing import Array

_PAYS_FROM = 8192
"""Tokens from which on the kernels are chosen unasked: the shortest length that was timed."""


def attend(
    tokens: Tokens,
    state: NeuralMemoryState | None,
    fresh: NeuralMemoryState,
    *,
    segment_ids: Array | None,
    chunk: int,
    activate: Callable[[Array], Array],
) -> tuple[Array, NeuralMemoryState]:
    """As `chunked.attend`, of a call that `objection` lets pass; the rest of a chunk is XLA's."""
    assert state is None
    assert segment_ids is None
    from pallas_kernels.neural_memory import mosaic_gpu

    length = tokens.q.shape[1]
    whole = length - length % chunk
    q, k, v, *gates = (x[:, :whole] for x in tokens)
    by_chunk = (x.reshape(x.shape[0], -1, chunk, x.shape[2]).transpose(0, 3, 1, 2) for x in gates)
    out, weights, momentum = mosaic_gpu.neural_memory(
        q, k, v, coefficients(*by_chunk), fresh.weights, activation=name_of(activate)
    )
    state = NeuralMemoryState(weights, momentum, weights, fresh.position)
    if whole == length:
        return out, state
    rest, state = chunked.attend(
        Tokens(*(x[:, whole:] for x in tokens)), None, state,
        segment_ids=None, chunk=chunk, activate=activate,
    )  # fmt: skip
    return jnp.concatenate([out, rest.astype(out.dtype)], axis=1), state


def objection(
    *,
    sizes: Sizes,
    dtype: jnp.dtype,
    weights: Sequence[Array],
    chunk: int,
    activation: Activation,
    packed: bool,
    continued: bool,
) -> str | None:
    """Why the kernels cannot serve a call, in words."""
    if not dispatch.on_hopper():
        return "needs a Hopper GPU (compute capability 9.0)"
    if not isinstance(activation, str):
        return "knows no activation but those with names"
    if packed or continued:
        return "reads whole documents from their start, without segment_ids or initial_state"
    # Imported where it can run: it takes longer to import than the rest of the ops.
    from pallas_kernels.neural_memory import mosaic_gpu

    return mosaic_gpu.objection(
        dtype=dtype, length=sizes.T, chunk=chunk,
        sizes=(sizes.F, *(x.shape[-1] for x in weights)),
    )  # fmt: skip


def pays(*, sizes: Sizes, weights: Sequence[Array], **call) -> bool:
    """Whether the kernels are the better choice where they can serve: of two layers, an H200 found.

    Compilers cannot partition them: over several devices they belong inside `shard_map`, and only
    who writes that can tell.
    """
    del call
    return len(weights) == 2 and sizes.T >= _PAYS_FROM and jax.device_count() == 1
