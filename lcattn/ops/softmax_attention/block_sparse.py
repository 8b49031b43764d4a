"""Visible keys as a plan of blocks, for the kernels of `block_sparse_attention`."""

from lcattn.ops.block_sparse_attention import visible
from lcattn.ops.visibility import Visibility
from lcattn.typing import Array


def attend(
    q, k, v, *, visibility: Visibility, scale: float, window: int | None, sinks: int, **rest
) -> tuple[Array, Array]:
    """Attention over the blocks in which a key is seen."""
    del rest
    return visible.attend(q, k, v, visibility, scale=scale, window=window, sinks=sinks)


def objection(*, alibi_slopes: Array | None, **rest) -> str | None:
    """Why a plan cannot serve a call, or None."""
    del rest
    return None if alibi_slopes is None else "takes no alibi_slopes"
