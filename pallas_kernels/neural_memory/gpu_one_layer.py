"""A memory of one layer: its walks, and what XLA does for every chunk by itself."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.neural_memory.gpu_linear import linear_pull, linear_walk
from pallas_kernels.neural_memory.gpu_plan import Course, Plan, pull_course
from pallas_kernels.neural_memory.gpu_read import Views
from pallas_kernels.tiles import TILE

_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def answer(plan: Plan, q, k, v, shares, views: Views, starts, course: Course | None):
    """As `gpu_two_layers.answer`."""
    (B, T, N, _), M = q.shape, k.shape[2]
    kept, ends = _train(plan, k, v, shares, starts, course)
    q = q.reshape(B, -1, TILE, M, N // M, TILE).transpose(0, 3, 1, 4, 2, 5)
    b, f = (x[:, :, :, None, :, None] for x in (views.kept, views.carried))
    scores = -views.written[:, :, :, None] * _einsum("...gtf,...sf->...gts", q, by_chunk(k))
    x = jnp.concatenate([x.astype(q.dtype) for x in (b * q, f * q, scores)], axis=-1)
    out = _einsum("...gtf,...fh->...gth", x, kept)
    out = out.transpose(0, 2, 4, 1, 3, 5).reshape(B, T, N, TILE).astype(q.dtype)
    return out, ends, (kept[..., :TILE, :],)


def by_chunk(x: jax.Array) -> jax.Array:
    """`[B,T,M,64] -> [B,M,n,64,64]`."""
    return x.reshape(x.shape[0], -1, TILE, *x.shape[2:]).transpose(0, 3, 1, 2, 4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _train(plan: Plan, k, v, shares, starts, course: Course | None):
    return linear_walk(plan, k, v, shares, starts, course)


def _train_forward(plan, k, v, shares, starts, course):
    kept, ends = linear_walk(plan, k, v, shares, starts, course)
    return (kept, ends), (k, shares, kept, course)


def _train_backward(plan, residuals, cotangents):
    k, shares, kept, course = residuals
    pulled, d_starts = linear_pull(plan, k, shares, *cotangents, course)
    w, s, e = jnp.split(kept, 3, axis=-2)
    a, b, z = jnp.split(pulled, 3, axis=-2)
    keys = by_chunk(k)
    through = [_einsum("...th,...fh->...tf", e, x) for x in (a, b)]
    d_keys = _einsum("...th,...fh->...tf", z, w)
    d_keys -= sum(shares[..., i, :, None] * x for i, x in enumerate(through))
    d_shares = [-jnp.sum(keys * x, axis=-1) for x in through] + [
        jnp.sum(x.astype(jnp.float32) * y, axis=-1) for x, y in ((a, w), (a, s), (b, s))
    ]

    def tokens(x):
        return x.transpose(0, 2, 3, 1, 4).reshape(k.shape).astype(k.dtype)

    d_shares = jnp.stack(d_shares, axis=-2)
    return tokens(d_keys), tokens(-z), d_shares, d_starts, pull_course(course, (a,))


_train.defvjp(_train_forward, _train_backward)
