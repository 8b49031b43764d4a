"""The kernels for Hopper GPUs, behind the op's contract.

They take keys and values of 64 and 128. Other keys get channels of zeros, which do not decay, and
other values are cut into blocks, each with a state of its own: so is one head of 256 values, as GLA
was published, two heads of 128 that share queries, keys and decays.
"""

import jax.numpy as jnp

from lcattn.ops import dispatch
from lcattn.ops.checks import Sizes
from lcattn.typing import Array, Float

# The shortest length measured, and there the kernels take a quarter of XLA's time: benchmarks/h200.
_PAYS_FROM = 256

_SMALL, _LARGE = 64, 128

# All chunks are one axis of the gradient's grid; fewer than these fill up the last group of each
# row, over all rows.
_FILLING = 512


def attend(
    q: Float[Array, "B T M G F"],
    k: Float[Array, "B T M F"],
    v: Float[Array, "B T M H"],
    log_decay: Float[Array, "B T M Fg"],
    state: Float[Array, "B M F H"],
    *,
    scale: float,
    chunk: int,
) -> tuple[Float[Array, "B T M G H"], Float[Array, "B M F H"]]:
    """Outputs and the final state, of a call that `objection` lets pass."""
    from pallas_kernels.gated_linear_attention import mosaic_gpu

    del chunk  # they have their own
    (B, T, M, G, F), H = q.shape, v.shape[3]
    f, h = served_sizes(F, H)
    blocks = -(-H // h)

    def shared(x: Array) -> Array:
        """Of every block: `[B,T,M,...,F] -> [B,T,M*blocks,...,f]`."""
        if x.shape[-1] == F:
            x = _padded(x, f)
        x = jnp.broadcast_to(x[:, :, :, None], (*x.shape[:3], blocks, *x.shape[3:]))
        return x.reshape(B, T, M * blocks, *x.shape[4:])

    values = _padded(v, blocks * h).reshape(B, T, M * blocks, h)
    start = jnp.pad(state, ((0, 0), (0, 0), (0, f - F), (0, blocks * h - H)))
    start = start.reshape(B, M, f, blocks, h).swapaxes(2, 3).reshape(B, M * blocks, f, h)
    out, final = mosaic_gpu.gated_linear_attention(
        shared(q).reshape(B, T, M * blocks * G, f), shared(k), values, shared(log_decay), start,
        scale=scale,
    )  # fmt: skip
    out = out.reshape(B, T, M, blocks, G, h).swapaxes(3, 4).reshape(B, T, M, G, blocks * h)
    final = final.reshape(B, M, blocks, f, h).swapaxes(2, 3).reshape(B, M, f, blocks * h)
    return out[..., :H], final[:, :, :F, :H]


def _padded(x: Array, size: int) -> Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])


def served_sizes(F: int, H: int) -> tuple[int, int]:
    """Sizes of keys and of a block of values, of those that the kernels take."""
    f = _SMALL if F <= _SMALL else _LARGE
    return f, _LARGE if f == _LARGE or H > _SMALL else _SMALL


def objection(*, sizes: Sizes, dtype: jnp.dtype, scale: float, **call) -> str | None:
    """Why the kernels cannot serve a call, in words."""
    del call
    if sizes.F > _LARGE:
        return f"takes keys of up to {_LARGE} numbers, not F={sizes.F}"
    if scale == 0:
        return "needs a scale other than 0"
    # Imported where it can run: it takes longer to import than the rest of the ops.
    from pallas_kernels.gated_linear_attention import mosaic_gpu
    from pallas_kernels.tiles import TILE

    f, h = served_sizes(sizes.F, sizes.H)
    chunks = sizes.B * -(-sizes.T // TILE)
    return mosaic_gpu.objection(dtype=dtype, F=f, H=h) or dispatch.no_grid(
        chunks + _FILLING if chunks else 0
    )


def pays(*, sizes: Sizes, chunk_size: int | None, **call) -> bool:
    """Whether the kernels, with chunks of their own, are the better choice where they serve."""
    del call
    return sizes.T >= _PAYS_FROM and chunk_size is None and dispatch.on_one_device()
