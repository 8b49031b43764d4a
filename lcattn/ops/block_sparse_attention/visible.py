"""Attention to whatever a rule lets queries see, by the plan of that rule."""

import jax.numpy as jnp

from lcattn.ops import dispatch
from lcattn.ops.block_sparse_attention import gpu_kernel
from lcattn.ops.block_sparse_attention.api import block_sparse_attention, block_sparse_part
from lcattn.ops.block_sparse_attention.builders import plan_of_rule
from lcattn.ops.checks import Sizes
from lcattn.ops.visibility import Visibility
from lcattn.typing import Array

# Tokens a block. A TPU pays for every block that is listed; none was at hand to measure.
_BLOCK = {"cpu": 128, "gpu": 128, "tpu": 512}

# The shortest length that was timed, and there it takes less than chunks of XLA: benchmarks/h200.
_PAYS_FROM = 4096


def default_block() -> int:
    """Tokens a block on the platform of a computation traced now."""
    return _BLOCK[dispatch.default_platform()]


def attend(
    q: Array,
    k: Array,
    v: Array,
    seen: Visibility,
    *,
    scale: float,
    window: int | None = None,
    sinks: int = 0,
    is_part: bool = False,
) -> tuple[Array, Array]:
    """Outputs `[B,T,N,H]` and log-sum-exps `[B,T,N]`, by the best form of block-sparse attention.

    The counterpart of `softmax_attention.chunked.attend`, for ops whose own form is a rule.

    Args:
      q: queries `[B,T,N,F]`.
      k: keys `[B,S,K,F]`.
      v: values `[B,S,K,H]`.
      seen: who sees whom, arrays `[b,...]`.
      scale: factor of the scores.
      window, sinks: bounds of what a query sees, as of `plan_of_rule`.
      is_part: whether this is a part of a softmax, as of `block_sparse_part`.
    """
    plan = plan_of_rule(
        Visibility(*(x[:, None] for x in seen)),
        query_block=min(default_block(), q.shape[1]),
        key_block=min(default_block(), k.shape[1]),
        window=window,
        sinks=sinks,
    )
    if is_part:
        return block_sparse_part(q, k, v, plan, scale=scale)
    out, lse = block_sparse_attention(q, k, v, plan, scale=scale, return_lse=True)
    return out, lse


def pays(*, sizes: Sizes, dtype: jnp.dtype, **call) -> bool:
    """Whether this is better than chunks in plain JAX: where kernels for Hopper run it."""
    del call
    is_long = min(sizes.T, sizes.S) >= _PAYS_FROM
    return is_long and gpu_kernel.runs_blocks(
        sizes=sizes, dtype=dtype, query_block=default_block(), key_block=default_block()
    )
