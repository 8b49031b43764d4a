r"""One chunk of one state: the arithmetic that both sweeps share, on tiles `[size, 128 tokens]`.

With A the scores of `tpu_decay` (rows are keys), b the sums of log decays from the start of the
chunk and a those to its end, and S `[F,H]` the state at its start,

    o  = v A + S^T (q e^b)            S' = e^{b_C} S + (k e^a) v^T

The backward sweep takes `jax.vjp` of this very code while the kernel is traced.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gated_linear_attention.tpu_decay import (
    after,
    before,
    decayed,
    finite,
    scores,
    total,
)
from pallas_kernels.tpu_products import product


class Chunk(NamedTuple):
    """What a state reads, in float32: keys `[F,C]`, values `[H,C]`, log decays `[F or 1,C]`."""

    k: jax.Array
    v: jax.Array
    log_decay: jax.Array

    @classmethod
    def of(cls, k: Any, v: Any, log_decay: Any, columns: Any) -> "Chunk":
        """The chunk in those columns of blocks."""
        k, v = (x[:, columns].astype(jnp.float32) for x in (k, v))
        return cls(k, v, finite(log_decay[:, columns]))


def read(q: jax.Array, state: jax.Array, chunk: Chunk, *, dtype) -> jax.Array:
    """Outputs `[H,C]` of queries `[F,C]`; products are of operands in `dtype`."""
    queries = decayed(q, before(chunk.log_decay, dtype), dtype)
    past = product(state, queries, (0, 0), dtype)
    weights = scores(q, chunk.k, chunk.log_decay, dtype)
    return past + product(chunk.v, weights, (1, 0), dtype)


def write(state: jax.Array, chunk: Chunk, *, dtype) -> jax.Array:
    """The state after the chunk."""
    keys = decayed(chunk.k, after(chunk.log_decay, dtype), dtype)
    return jnp.exp(total(chunk.log_decay)) * state + product(keys, chunk.v, (1, 1), dtype)
