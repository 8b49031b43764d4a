"""A memory of one layer: its walks, and what XLA does for every chunk by itself."""

import functools

import jax

from pallas_kernels.neural_memory import gpu_einsums as einsums
from pallas_kernels.neural_memory.gpu_gates import Views
from pallas_kernels.neural_memory.gpu_linear import linear_pull, linear_walk
from pallas_kernels.neural_memory.gpu_plan import Course, Plan, pull_course


def answer(plan: Plan, q, k, v, shares, views: Views, starts, course: Course | None):
    """As `gpu_two_layers.answer`."""
    kept, ends = _train(plan, k, v, shares, starts, course)
    out = einsums.read(plan, q, views, [einsums.by_chunk(k)], [kept])
    return out, ends, (kept[..., : k.shape[-1], :],)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _train(plan: Plan, k, v, shares, starts, course: Course | None):
    return linear_walk(plan, k, v, shares, starts, course)


def _train_forward(plan, k, v, shares, starts, course):
    kept, ends = linear_walk(plan, k, v, shares, starts, course)
    return (kept, ends), (k, shares, kept, course)


def _train_backward(plan, residuals, cotangents):
    k, shares, kept, course = residuals
    d_kept, d_ends = cotangents
    pulled, d_outputs, d_starts = linear_pull(plan, k, shares, d_kept, d_ends, course)
    d_tokens = einsums.token_gradients(
        shares, [einsums.by_chunk(k)], [kept], [pulled], d_outputs, d_outputs
    )
    d_after = (pulled[..., : k.shape[-1], :],)
    return *d_tokens, d_starts, pull_course(course, d_after)


_train.defvjp(_train_forward, _train_backward)
