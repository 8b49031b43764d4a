"""The kernels for TPUs, behind the op's contract."""

import jax.numpy as jnp

from lcattn.ops.checks import Sizes
from lcattn.typing import Array, Float


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
    from pallas_kernels.gated_linear_attention import mosaic_tpu

    del chunk  # they have their own
    B, T, M, G, F = q.shape
    q = q.reshape(B, T, M * G, F)
    out, state = mosaic_tpu.gated_linear_attention(q, k, v, log_decay, state)
    return scale * out.reshape(B, T, M, G, -1), state


def objection(*, sizes: Sizes, states: int, dtype: jnp.dtype, **call) -> str | None:
    """Why the kernels cannot serve a call, in words."""
    del call
    # Imported where it can run: it takes longer to import than the rest of the ops.
    from pallas_kernels.gated_linear_attention import mosaic_tpu

    return mosaic_tpu.objection(dtype=dtype, groups=sizes.N // states, F=sizes.F, H=sizes.H)
