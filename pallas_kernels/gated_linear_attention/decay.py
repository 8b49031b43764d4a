r"""Decays inside a chunk of 64 tokens: sums of log decays, as products with matrices of 0 and ±1.

Such a product, summed in float32, is exact but for the sum's own rounding. Operands are bfloat16;
a float32 log decay is the sum of two such terms.

Scores with decays, A_ts = sum_c q_tc k_sc e^{G_tc - G_sc}, take a product of matrices with the
factor split between q and k at a token that both refer to. A chunk is MILD where no channel loses
more than e^-60 in either half, which the gates of trained models hardly ever do: then all tokens
refer to the middle m,

    q_t e^{G_t - G_m}  ·  k_s e^{G_m - G_s}

since exponents of those on the wrong side of it are <= 60, and the factors of any s <= t still
multiply to <= 1. The same scaled q and k also read and write the state, if that too refers to the
middle: e^{G_m} S.

A chunk that is not mild is STRONG. For h = 32, 16 ... 1, the right one of two neighbouring blocks
of h tokens refers to the border between them, and so does the left:

    q_t e^{sum from the border to t}  ·  k_s e^{sum from after s to the border}

All exponents are <= 0, however strong the decay, and each is a sum of terms <= 0: nothing cancels.
With the diagonal that makes seven products, each for its own part of A.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.products import Operand, Products
from pallas_kernels.tiles import ALONG_ROWS, TILE, WGMMA, iota

LOWEST = -104.0
"""Log decays below leave nothing in float32."""

_HALF = TILE // 2
_LEVELS = 7
_MILD = math.exp(-60)
_NO_STATE_LEFT = -1e30  # stands for -inf, of which products with 0 would make NaN


class Decay(NamedTuple):
    """Log decays of every token, and what follows from them for whole chunks.

    Attributes:
      terms: `[B,chunks·n·64,heads,F]` in bfloat16: of every chunk the log decays of its 64 tokens,
        or where n = 2 those rounded, and then what rounding left of them.
      halves: what is left of a state after each half of a chunk, `[B,chunks,2,heads,F]` in float32.
    """

    terms: Any
    halves: Any

    @property
    def rows(self) -> int:
        """Rows of a chunk's terms, 64 or 128."""
        return self.terms.shape[1] // self.halves.shape[1]

    @classmethod
    def of(cls, log_decay: jax.Array, F: int) -> "Decay":
        """From log decays `[B,T,heads,F or 1]`, of each feature or of all; T in whole chunks."""
        B, T, M, own = log_decay.shape
        finite = jnp.maximum(log_decay, _NO_STATE_LEFT)
        terms = log_decay  # made finite in the kernels, and only in strong chunks
        if log_decay.dtype != jnp.bfloat16:
            # Not a cast there and back, which XLA is free to leave out.
            high = lax.reduce_precision(finite, exponent_bits=8, mantissa_bits=7)
            both = (x.reshape(B, T // TILE, TILE, M, own) for x in (high, finite - high))
            terms = jnp.concatenate(list(both), axis=2).astype(jnp.bfloat16)
            terms = terms.reshape(B, 2 * T, M, own)
        # Not a reduction over tokens, with which XLA takes more than twice the time.
        parts = finite.reshape(B, T // TILE, 2, _HALF, M, own).astype(jnp.float32)
        sums = functools.reduce(operator.add, (parts[:, :, :, i] for i in range(_HALF)))
        return cls(*(jnp.broadcast_to(x, (*x.shape[:-1], F)) for x in (terms, jnp.exp(sums))))

    def over_groups(self, groups: int) -> jax.Array:
        """What is left of a state after each group of chunks, `[B,heads,groups,F]`."""
        B, _, _, M, F = self.halves.shape
        return self.halves.reshape(B, groups, -1, M, F).prod(axis=2).swapaxes(1, 2)

    def strong_groups(self, groups: int) -> jax.Array:
        """1 for groups with a chunk that is not mild, else 0: `[B,heads,groups]` in int32."""
        B, _, _, M, F = self.halves.shape
        least = self.halves.reshape(B, groups, -1, M, F).min(axis=2).min(axis=-1)
        return (least.swapaxes(1, 2) < _MILD).astype(jnp.int32)


Weights = Callable[[jax.Array, jax.Array], jax.Array]
"""How the sum of token t (row) takes in token s (column): integers."""


def up_to(t: jax.Array, s: jax.Array) -> jax.Array:
    """The sum over tokens not after t."""
    return jnp.where(s <= t, 1, 0)


def after(t: jax.Array, s: jax.Array) -> jax.Array:
    """The sum over tokens after t."""
    return jnp.where(s > t, 1, 0)


def from_middle(t: jax.Array, s: jax.Array) -> jax.Array:
    """The sum from the middle of the chunk up to t, negative for t before it."""
    return jnp.where(s >= _HALF, up_to(t, s), 0) - jnp.where(s < _HALF, after(t, s), 0)


def matrix(weights: Weights, rows: int = TILE) -> jax.Array:
    """The operand that sums terms, `[64,rows]`, in registers."""
    numbers = weights(iota(0, rows), iota(1, rows) & (TILE - 1))
    return numbers.astype(jnp.float32).astype(jnp.bfloat16)


def summed(products: Products, weights: Weights | Operand, terms) -> jax.Array:
    """Sums `[64,columns]` of a chunk's terms in shared memory.

    Args:
      products: the matrix unit.
      weights: those of the sums, or their matrix `[64,64]` in shared memory.
      terms: `[64 or 128,columns]`.
    """
    if callable(weights):
        return products.product(matrix(weights, terms.shape[0]), terms)
    parts = (terms.at[pl.ds(i, TILE)] for i in range(0, terms.shape[0], TILE))
    return functools.reduce(operator.add, (products.product(weights, part) for part in parts))


def make_finite(terms) -> None:
    """Replaces -inf in terms in shared memory."""
    for i in range(terms.shape[0] // TILE):
        part = terms.at[pl.ds(i * TILE, TILE)]
        numbers = plgpu.load(part, layout=WGMMA)
        part[...] = jnp.maximum(numbers, jnp.asarray(_NO_STATE_LEFT, numbers.dtype))
    plgpu.commit_smem()


def is_strong(halves) -> jax.Array:
    """Whether a chunk is not mild, 1 or 0, from its `[2,F]` in shared memory."""
    least = [plgpu.load(halves.at[i], layout=ALONG_ROWS).min() for i in range(2)]
    return jnp.where(jnp.minimum(*least) < _MILD, 1, 0)


def passed(halves, layout, *, reverse: bool = False) -> tuple[jax.Array, jax.Array]:
    """What is left of a state after the half of a chunk that it enters first, and the other.

    Args:
      halves: `[2,64]` in shared memory.
      layout: along which side of a tile the features lie.
      reverse: whether the state comes from the end.
    """
    first, second = (plgpu.load(halves.at[i], layout=layout) for i in range(2))
    return (second, first) if reverse else (first, second)


class Level(NamedTuple):
    """One of the products that A is made of.

    Attributes:
      queries, keys: factors of q and k, `[64,64 features]`.
      part: the part of A, `[64,64]`.
    """

    queries: jax.Array
    keys: jax.Array
    part: jax.Array


def mild_level(sums: jax.Array) -> Level:
    """The only level of a mild chunk, of the sums `from_middle`."""
    return Level(jnp.exp(sums), jnp.exp(-sums), iota(0) >= iota(1))


def over_strong_levels(
    body: Callable[[Level, Any], Any],
    state: Any,
    *,
    products: Products,
    terms,
    transposed: bool = False,
) -> Any:
    """`state = body(level, state)` over the levels of a strong chunk.

    Args:
      body: what to do.
      state: what it starts from.
      products: the matrix unit.
      terms: those of the chunk and 64 features, in shared memory.
      transposed: whether parts are those of the transposed A.
    """

    # Masks come from integers: the chip's compiler takes `&` and `|` of masks, not their negation.
    def step(i, state):
        diagonal = jnp.where(i == _LEVELS - 1, 1, 0)
        shift = jnp.maximum(_LEVELS - 2 - i, 0)

        def block(x):
            return lax.shift_right_logical(x, jnp.broadcast_to(shift, x.shape))

        def own(t, s):
            # Right of the border the tokens up to t, left of it those after; none on the diagonal.
            right = block(t) & 1
            inside = block(t) == block(s) + TILE * diagonal
            return jnp.where(inside & ((2 * right - 1) * (t - s) >= 1 - right), 1, 0)

        factor = jnp.exp(summed(products, own, terms))
        t, s = (iota(1), iota(0)) if transposed else (iota(0), iota(1))
        beside = (block(t) == block(s) + 1 - diagonal) & ((block(t) & 1) + diagonal >= 1)
        return body(Level(factor, factor, beside & (t >= s)), state)

    return lax.fori_loop(0, _LEVELS, step, state)


def times(tile, factor: jax.Array) -> jax.Array:
    """A bfloat16 tile in shared memory, times a factor, as an operand."""
    numbers = plgpu.load(tile, layout=WGMMA).astype(jnp.float32)
    return (numbers * factor).astype(jnp.bfloat16)
