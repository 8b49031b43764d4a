"""Attention to whatever a rule lets queries see, by the plan of that rule."""

import jax.numpy as jnp

from lcattn.ops import dispatch
from lcattn.ops.block_sparse_attention import kernel
from lcattn.ops.block_sparse_attention.api import block_sparse_attention
from lcattn.ops.block_sparse_attention.builders import plan_of_rule
from lcattn.ops.checks import Sizes
from lcattn.ops.visibility import Visibility
from lcattn.typing import Array

# Tokens a block. A TPU pays for every block that is listed; none was at hand to measure.
_BLOCK = {"cpu": 128, "gpu": 128, "tpu": 512}

# The shortest length at which HyperAttention was timed as a plan: benchmarks/h200.
_PAYS_FROM = 16_384


def default_block() -> int:
    """Tokens a block on the platform of a computation traced now."""
    return _BLOCK[dispatch.default_platform()]


def pays(
    *, sizes: Sizes, dtype: jnp.dtype, query_block: int | None = None,
    key_block: int | None = None, **call,
) -> bool:  # fmt: skip
    """Whether to compile a mechanism to a plan unasked.

    Where the kernels for Hopper GPUs run it: HyperAttention was then five times faster than its
    loop in plain JAX (`benchmarks/h200/sparse_mechanisms.json`). Other mechanisms take the same
    kernels, but have not been timed by themselves, and no other kernels have been measured.
    """
    del call
    objection = kernel.objection_to_blocks(
        sizes=sizes, dtype=dtype, query_block=query_block or min(default_block(), sizes.T),
        key_block=key_block or min(default_block(), sizes.S),
    )  # fmt: skip
    return sizes.T >= _PAYS_FROM and objection is None and kernel.pays()


def attend(
    q: Array,
    k: Array,
    v: Array,
    seen: Visibility,
    *,
    scale: float,
    window: int | None = None,
    sinks: int = 0,
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
    """
    plan = plan_of_rule(
        Visibility(*(x[:, None] for x in seen)),
        query_block=min(default_block(), q.shape[1]),
        key_block=min(default_block(), k.shape[1]),
        window=window,
        sinks=sinks,
    )
    out, lse = block_sparse_attention(q, k, v, plan, scale=scale, return_lse=True)
    return out, lse
