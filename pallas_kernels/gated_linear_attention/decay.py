r"""Decays inside a chunk of 64 tokens: sums of log decays, as products with matrices of 0 and 1.

Such a product, summed in float32, is exact but for the sum's own rounding, and each entry is a sum
of the terms it is made of: nothing cancels. Operands are bfloat16; a float32 log decay is the sum
of two such terms. They are not two products summed in one accumulator: of two products of one
matrix in registers, the second came out wrong on the chip.

Scores with decays, A_ts = sum_c q_tc k_sc e^{G_tc - G_sc}, take a product of matrices with the
factor split between q and k at a border. For h = 32, 16 ... 1, the right one of two neighbouring
blocks of h tokens refers to the border between them, and so does the left:

    q_t e^{sum from the border to t}  ·  k_s e^{sum from after s to the border}

All exponents are <= 0, however strong the decay; with the diagonal that makes seven products, each
for its own part of A. Where no channel loses more than e^-60 in half a chunk, which the gates of
trained models hardly ever do, a single one suffices: all tokens refer to the middle, the exponents
of those on the wrong side of it are <= 60, and the factors of any s <= t still multiply to <= 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.products import Products
from pallas_kernels.tiles import TILE, iota

LEVELS = 7
"""Products that A takes at any decay."""

LOWEST = -104.0
"""Log decays below leave nothing in float32."""

_MIDDLE = 5  # log2 of half a chunk
_MILD = 60.0
_NO_STATE_LEFT = -1e30  # stands for -inf, of which products with 0 would make NaN


class Decay(NamedTuple):
    """Log decays of every token, and what follows from them for whole chunks.

    Attributes:
      terms: `[B,chunks·n·64,heads,F]` in bfloat16: of every chunk the log decays of its 64 tokens,
        or where n = 2 those rounded, and then what rounding left of them.
      factor: `exp` of their sum over each chunk, `[B,chunks,heads,F]` in float32.
      levels: products that A takes, `[B,chunks,heads]` in int32.
    """

    terms: Any
    factor: Any
    levels: Any
    halves: Any

    @property
    def rows(self) -> int:
        """Rows of a chunk's terms, 64 or 128."""
        return self.terms.shape[1] // self.factor.shape[1]

    @classmethod
    def of(cls, log_decay: jax.Array) -> "Decay":
        """From log decays `[B,T,heads,F]`, T in whole chunks."""
        B, T, M, F = log_decay.shape
        terms = log_decay
        log_decay = jnp.maximum(log_decay, _NO_STATE_LEFT)
        if log_decay.dtype != jnp.bfloat16:
            # Not a cast there and back, which XLA is free to leave out.
            high = lax.reduce_precision(log_decay, exponent_bits=8, mantissa_bits=7)
            both = (x.reshape(B, T // TILE, TILE, M, F) for x in (high, log_decay - high))
            terms = jnp.concatenate(list(both), axis=2).astype(jnp.bfloat16)
            terms = terms.reshape(B, 2 * T, M, F)
        sums = jnp.sum(
            log_decay.reshape(B, T // TILE, 2, TILE // 2, M, F), axis=3, dtype=jnp.float32
        )
        mild = sums.min(axis=4).min(axis=2) >= -_MILD
        return cls(
            terms, jnp.exp(sums.sum(axis=2)), jnp.where(mild, 1, LEVELS).astype(jnp.int32),
            jnp.exp(sums),
        )  # fmt: skip


Tokens = Callable[[jax.Array, jax.Array], jax.Array]
"""Whether the sum of token t (row) takes in token s (column)."""


def summed(products: Products, tokens: Tokens, terms) -> jax.Array:
    """Sums of log decays `[64,F]`, of a chunk's terms in shared memory."""
    t, s = (iota(axis, terms.shape[0]) for axis in (0, 1))
    matrix = jnp.where(tokens(t, s & (TILE - 1)), 1.0, 0.0)
    return products.product(matrix.astype(jnp.bfloat16), terms)


def up_to(t: jax.Array, s: jax.Array) -> jax.Array:
    """Tokens not after t."""
    return s <= t


def after(t: jax.Array, s: jax.Array) -> jax.Array:
    """Tokens after t."""
    return s > t


class Level(NamedTuple):
    """One of the products that A is made of.

    Attributes:
      queries, keys: factors of q and k, `[64,F]`.
      part: the part of A, `[64,64]`.
    """

    queries: jax.Array
    keys: jax.Array
    part: jax.Array


def over_levels(
    body: Callable[[Level, Any], Any], state: Any, *, products: Products, terms, count
) -> Any:
    """`state = body(level, state)` over the levels of a chunk.

    Args:
      body: what to do.
      state: what it starts from.
      products: the matrix unit.
      terms: those of the chunk, in shared memory.
      count: the chunk's number of levels.
    """
    strong = jnp.where(count > 1, 1, 0)

    # Masks come from integers: the chip's compiler takes `&` and `|` of masks, not their negation.
    def step(i, state):
        diagonal = jnp.where(i == LEVELS - 1, 1, 0)
        shift = jnp.maximum(_MIDDLE - i, 0)

        def block(x):
            return lax.shift_right_logical(x, jnp.broadcast_to(shift, x.shape))

        def own(t, s):
            # Right of the border the tokens up to t, left of it those after; none on the diagonal.
            right = block(t) & 1
            inside = block(t) == block(s) + TILE * diagonal
            return inside & ((2 * right - 1) * (t - s) >= 1 - right)

        sums = summed(products, own, terms)
        rows, columns, distance = block(iota(0)), block(iota(1)), iota(0) - iota(1)
        beside = (rows == columns + 1 - diagonal) & ((rows & 1) + diagonal >= 1)
        part = (beside | (jnp.zeros_like(rows) + strong == 0)) & (distance >= 0)
        right = block(iota(0, sums.shape[1])) & 1
        queries = jnp.where(right + strong == 0, -sums, sums)
        keys = jnp.where(right - strong == 1, -sums, sums)
        return body(Level(jnp.exp(queries), jnp.exp(keys), part), state)

    return lax.fori_loop(0, count, step, state)
