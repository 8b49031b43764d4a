"""The kernels for TPUs, behind the op's contract."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from lcattn.ops.checks import Sizes
from lcattn.ops.neural_memory.chunked import Tokens
from lcattn.ops.neural_memory.network import Activation
from lcattn.ops.neural_memory.state import NeuralMemoryState, select
from lcattn.ops.neural_memory.windows import Windows, lay_out
from lcattn.typing import Array, Bool, Int


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
    from pallas_kernels.neural_memory import mosaic_tpu

    shape = tokens.decay.shape
    if state is None and segment_ids is None:
        windows = _Aligned.of(shape[0], shape[1], chunk)
    else:
        windows = lay_out(segment_ids, None if state is None else state.position, shape, chunk)
    n, B, C = windows.used.shape
    q, k, v, *gates = (x.reshape(B, n, C, *x.shape[2:]) for x in map(windows.gather, tokens))
    start = state or fresh
    out, layers = mosaic_tpu.neural_memory(
        q, k, v, gates, _kinds(windows), windows.used.swapaxes(0, 1), windows.first.swapaxes(0, 1),
        tuple(
            jnp.stack(parts, axis=2)
            for parts in zip(start.weights, start.momentum, start.anchor, strict=True)
        ),
        None if segment_ids is None else fresh.weights,
        activate=activate,
    )  # fmt: skip
    weights, momentum, anchor = (tuple(x[:, :, part] for x in layers) for part in range(3))
    anchor = select(windows.position == 0, weights, anchor)
    out = windows.scatter(out.reshape(B, n * C, *out.shape[3:]))
    return out, NeuralMemoryState(weights, momentum, anchor, windows.position)


class _Aligned(NamedTuple):
    """`Windows` of whole sequences from their start: nothing is moved."""

    length: int
    used: Bool[Array, "n B C"]
    first: Bool[Array, "n B C"]
    starts_document: Bool[Array, "n B"]
    starts_chunk: Bool[Array, "n B"]
    position: Int[Array, "B"]

    @classmethod
    def of(cls, rows: int, length: int, chunk: int) -> "_Aligned":
        width = min(chunk, length)
        slots = -(-length // width), rows, width
        index = jnp.arange(slots[0] * width).reshape(-1, 1, width)
        return cls(
            length,
            used=jnp.broadcast_to(index < length, slots),
            first=jnp.broadcast_to(index % width == 0, slots),
            starts_document=jnp.zeros(slots[:2], bool),
            starts_chunk=jnp.ones(slots[:2], bool),
            position=jnp.full((rows,), length % chunk, jnp.int32),
        )

    def gather(self, x: Array) -> Array:
        n, _, C = self.used.shape
        return jnp.pad(x, ((0, 0), (0, n * C - self.length)) + ((0, 0),) * (x.ndim - 2))

    def scatter(self, x: Array) -> Array:
        return x[:, : self.length]


def _kinds(windows: Windows | _Aligned) -> Int[Array, "B n"]:
    """What the kernels call the beginning of each window."""
    from pallas_kernels.neural_memory.tpu_plan import Kind

    begins = jnp.where(windows.starts_chunk, Kind.STARTS, Kind.CONTINUES)
    kinds = jnp.where(windows.starts_document, Kind.RENEWS, begins)
    return jnp.where(windows.used.any(axis=2), kinds, Kind.SKIPPED).astype(jnp.int32).T


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
    from pallas_kernels.neural_memory import mosaic_tpu

    return mosaic_tpu.objection(
        dtype=dtype, groups=sizes.N // weights[0].shape[0], chunk=min(chunk, sizes.T),
        sizes=(sizes.F, *(x.shape[-1] for x in weights)),
    )  # fmt: skip
