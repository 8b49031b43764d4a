"""A memory of two layers: its kernels put together, with their gradients."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.neural_memory.gpu_plan import Plan
from pallas_kernels.neural_memory.gpu_pull import pull
from pallas_kernels.neural_memory.gpu_read import Views, read
from pallas_kernels.neural_memory.gpu_read_pull import read_pull
from pallas_kernels.neural_memory.gpu_tokens import token_gradients
from pallas_kernels.neural_memory.gpu_walk import Memories, walk
from pallas_kernels.tiles import TILE


def answer(plan: Plan, q, k, v, shares, views: Views, weights):
    """Answers `[B,T,N,64]`, and W and S of each layer after the last chunk.

    Args:
      plan: options.
      q: queries `[B,T,N,64]`.
      k, v, shares: as for `gpu_walk.walk`.
      views: as for `gpu_read.read`.
      weights: the network before the first chunk.
    """
    memories, ends = _train(plan, k, v, shares, *weights)
    return _read(plan, q, k, memories, views), ends


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _train(plan: Plan, k, v, shares, w1, w2):
    return walk(plan, k, v, shares, (w1, w2))


def _train_forward(plan, k, v, shares, w1, w2):
    memories, ends = walk(plan, k, v, shares, (w1, w2))
    return (memories, ends), (k, shares, memories)


def _train_backward(plan, residuals, cotangents):
    k, shares, memories = residuals
    pulled, (d_w1, _, d_w2, _) = pull(plan, k, shares, memories, *cotangents)
    return *token_gradients(plan, k, shares, memories, pulled), d_w1, d_w2


_train.defvjp(_train_forward, _train_backward)


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
