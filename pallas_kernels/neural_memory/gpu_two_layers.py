"""A memory of two layers: its kernels put together, with their gradients."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.neural_memory import gpu_einsums as einsums
from pallas_kernels.neural_memory.gpu_gates import Views
from pallas_kernels.neural_memory.gpu_plan import Course, Plan, pull_course
from pallas_kernels.neural_memory.gpu_pull import pull
from pallas_kernels.neural_memory.gpu_read import read
from pallas_kernels.neural_memory.gpu_read_pull import read_pull
from pallas_kernels.neural_memory.gpu_tokens import token_gradients
from pallas_kernels.neural_memory.gpu_walk import Memories, walk
from pallas_kernels.tiles import TILE


def answer(plan: Plan, q, k, v, shares, views: Views, starts, course: Course | None):
    """Answers `[B,T,N,H]`; W and S of each layer after the last chunk, W before every one.

    Args:
      plan: options.
      q: queries `[B,T,N,H]`.
      k, v, shares: as for `gpu_walk.walk`.
      views: as for `gpu_read.read`.
      starts: W and S of each layer before the first chunk.
      course: as for `gpu_walk.walk`.
    """
    memories, ends = _train(plan, k, v, shares, starts, course)
    H, F = starts[0].shape[-2:]
    if H == TILE:
        out = _read(plan, q, k, memories, views, course)
    else:
        inputs = einsums.by_chunk(k), memories.hidden
        out = einsums.read(plan, q, views, inputs, (memories.first, memories.second))
    return out, ends, (memories.first[..., :H, :], memories.second[..., :F, :])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _train(plan: Plan, k, v, shares, starts, course: Course | None):
    return walk(plan, k, v, shares, starts, course, keep=False)[:2]


def _train_forward(plan, k, v, shares, starts, course):
    memories, ends, slopes = walk(plan, k, v, shares, starts, course, keep=True)
    return (memories, ends), (k, shares, memories, slopes, course)


def _train_backward(plan, residuals, cotangents):
    k, shares, memories, slopes, course = residuals
    d_memories, d_ends = cotangents
    pulled, d_starts = pull(plan, k, shares, memories, slopes, d_memories, d_ends, course)
    H, F = k.shape[-1], memories.hidden.shape[-1]
    if H == TILE:
        d_tokens = token_gradients(plan, k, shares, memories, pulled, course)
    else:
        d_tokens = einsums.token_gradients(
            shares, (einsums.by_chunk(k), memories.hidden), (memories.first, memories.second),
            (pulled.first, pulled.second), pulled.hidden, pulled.outputs,
        )  # fmt: skip
    d_after = pulled.first[..., :H, :], pulled.second[..., :F, :]
    return *d_tokens, d_starts, pull_course(course, d_after)


_train.defvjp(_train_forward, _train_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(plan: Plan, q, k, memories: Memories, views: Views, course: Course | None):
    return read(plan, q, k, memories, views, course, keep=False)[0]


def _read_forward(plan, q, k, memories, views, course):
    out, *parts = read(plan, q, k, memories, views, course, keep=True)
    return out, (q, k, memories, views, course, parts)


def _read_backward(plan, residuals, d_out):
    q, k, memories, views, course, parts = residuals
    d_q, d_k, d_memories, d_views = read_pull(plan, q, k, memories, views, course, d_out)
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

    return d_q, per_memory(d_k, 2), *jax.tree.map(per_memory, (d_memories, d_views)), None


_read.defvjp(_read_forward, _read_backward)
