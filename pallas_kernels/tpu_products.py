"""Products of tiles that can be differentiated inside a kernel, and stay in the operands' dtype."""

import functools

import jax

from pallas_kernels.tpu import dot


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(a: jax.Array, b: jax.Array, contract: tuple[int, int], dtype) -> jax.Array:
    """A product of float32 tiles, rounded to `dtype` before, as are gradients in its backward."""
    return dot(a.astype(dtype), b.astype(dtype), contract)


def _product_forward(a, b, contract, dtype):
    a, b = a.astype(dtype), b.astype(dtype)
    return dot(a, b, contract), (a, b)


def _product_backward(contract, dtype, operands, d_out):
    (a, b), d_out = operands, d_out.astype(dtype)
    ca, cb = contract
    d_a = dot(d_out, b, (1, 1 - cb)) if ca else dot(b, d_out, (1 - cb, 1))
    d_b = dot(d_out, a, (0, 1 - ca)) if cb else dot(a, d_out, (1 - ca, 0))
    return d_a, d_b


product.defvjp(_product_forward, _product_backward)
