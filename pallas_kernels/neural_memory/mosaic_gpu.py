r"""Titans' neural memory of two layers for Hopper GPUs, in Pallas Mosaic GPU.

Only the memory itself has to go from chunk to chunk. So that alone is a walk, of one cluster a
memory, which leaves network, momentum and writes of every chunk in global memory (`gpu_walk`); all
else is done for every chunk by itself: queries are answered (`gpu_read`), and coefficients of gates
are XLA's. The gradient goes the same way back: chunks by themselves (`gpu_read_pull`), a walk in
reverse that carries the gradient of the memory (`gpu_pull`), and chunks by themselves for what
follows from it for keys, values and gates (`gpu_tokens`).

What the walk leaves is kept for the gradient, 8 H F + 2 C (F + H) bfloat16 numbers a chunk and
memory; operands of products are bfloat16, all else float32.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.neural_memory.gpu_plan import Plan
from pallas_kernels.neural_memory.gpu_pull import pull
from pallas_kernels.neural_memory.gpu_read import Views, read
from pallas_kernels.neural_memory.gpu_read_pull import read_pull
from pallas_kernels.neural_memory.gpu_tokens import token_gradients
from pallas_kernels.neural_memory.gpu_walk import Memories, walk
from pallas_kernels.tiles import TILE

MOST_HIDDEN = 256
"""Hidden units that clusters of four CTAs hold."""


def neural_memory(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    coefficients: Any,
    weights: tuple[jax.Array, ...],
    *,
    activation: str,
    interpret: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Answers of a memory that is trained on the way; differentiable in every array.

    Args:
      q: queries `[B,T,M,G,64]`, bfloat16; T is a multiple of 64.
      k: keys `[B,T,M,64]`.
      v: values `[B,T,M,64]`.
      coefficients: what each token of a chunk of 64 sees, and what the chunk leaves behind, as
        `lcattn.ops.neural_memory.coefficients` says: `kept` and `carried` `[B,M,n,64]`, `written`
        `[B,M,n,64,64]`, `momentum` `[B,M,n]` and `pending` `[B,M,n,64]`.
      weights: the network before the first chunk, `[B,M,64,F]` and `[B,M,F,64]` in float32.
      activation: by name, "gelu" in its tanh form.
      interpret: whether to run in the CPU simulator.

    Returns:
      `[B,T,M,G,64]` in the dtype of q, and the network and its momentum after the last chunk.

    Raises:
      ValueError: saying why these kernels do not serve the call.
    """
    sizes = (q.shape[-1], *(x.shape[-1] for x in weights))
    reason = objection(dtype=q.dtype, length=q.shape[1], chunk=TILE, sizes=sizes)
    if reason is not None:
        raise ValueError(f"neural_memory: the mosaic_gpu kernels {reason}")
    written, plan = coefficients.written, Plan(activation, interpret)
    decays = coefficients.kept[..., -1], coefficients.carried[..., -1], coefficients.momentum
    memories, ends = _train(
        plan, k, v, written[..., -1, :], coefficients.pending, jnp.stack(decays, axis=-1), *weights
    )
    views = Views(coefficients.kept, coefficients.carried, written)
    out = _read(plan, q.reshape(*q.shape[:2], -1, TILE), k, memories, views).reshape(q.shape)
    return out, ends[::2], ends[1::2]


def objection(*, dtype, length: int, chunk: int, sizes: Sequence[int]) -> str | None:
    """Why the kernels do not serve a call, in words, or None."""
    if dtype != jnp.bfloat16:
        return f"take bfloat16, not {jnp.dtype(dtype).name}"
    if chunk != TILE or length < TILE:
        return f"take chunks of {TILE} tokens and a whole one at least, not {chunk} of {length}"
    hidden = range(TILE, MOST_HIDDEN + 1, TILE)
    if len(sizes) != 3 or sizes[0] != TILE or sizes[2] != TILE or sizes[1] not in hidden:
        return (
            f"take layers of sizes {TILE} -> F -> {TILE}, F a multiple of {TILE} up to"
            f" {MOST_HIDDEN}, not {' -> '.join(map(str, sizes))}"
        )
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(plan: Plan, q, k, memories: Memories, views: Views):
    return read(plan, q, k, memories, views, keep=False)[0]


def _read_forward(plan, q, k, memories, views):
    out, *parts = read(plan, q, k, memories, views, keep=True)
    return out, (q, k, memories, views, parts)


def _read_backward(plan, residuals, d_out):
    q, k, memories, views, parts = residuals
    d_q, d_k, d_memories, d_views = read_pull(plan, q, k, memories, views, d_out)
    (B, _, N, _), M = q.shape, k.shape[2]
    d_kept, d_carried = (
        jnp.sum(d_out.astype(jnp.float32) * part, axis=-1).swapaxes(1, 2).reshape(B, N, -1, TILE)
        for part in parts
    )
    d_views = d_views._replace(kept=d_views.kept + d_kept, carried=d_views.carried + d_carried)

    def per_memory(x, axis=1):
        """Sums over the query heads that read one memory."""
        if N == M:
            return x
        x = x.reshape(*x.shape[:axis], M, N // M, *x.shape[axis + 1 :])
        return x.astype(jnp.float32).sum(axis=axis + 1).astype(x.dtype)

    return d_q, per_memory(d_k, 2), *jax.tree.map(per_memory, (d_memories, d_views))


_read.defvjp(_read_forward, _read_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _train(plan: Plan, k, v, written, pending, decays, w1, w2):
    return _train_forward(plan, k, v, written, pending, decays, w1, w2)[0]


def _train_forward(plan, k, v, written, pending, decays, w1, w2):
    decays = jnp.broadcast_to(decays[..., None], (*decays.shape, TILE))
    shares = jnp.concatenate([written[..., None, :], pending[..., None, :], decays], axis=-2)
    memories, ends = walk(plan, k, v, shares, (w1, w2))
    return (memories, ends), (k, shares, memories)


def _train_backward(plan, residuals, cotangents):
    k, shares, memories = residuals
    pulled, (d_w1, _, d_w2, _) = pull(plan, k, shares, memories, *cotangents)
    d_k, d_v, d_shares = token_gradients(plan, k, shares, memories, pulled)
    d_written, d_pending, d_decays = d_shares[..., 0, :], d_shares[..., 1, :], d_shares[..., 2:, :]
    return d_k, d_v, d_written, d_pending, d_decays.sum(axis=-1), d_w1, d_w2


_train.defvjp(_train_forward, _train_backward)
