r"""Feature maps as kernels compute them: 64 features at a time, in registers.

A kernel needs a feature map phi in four ways, for a tile x `[64 tokens, F]` in shared memory and
the slice i of 64 features:

    rows     phi_i(x)  [64 tokens, 64 features]   left operand of phi(x) S
    columns  phi_i(x)ᵀ [64 features, 64 tokens]   left operand of the sum S += phi(x)ᵀ v
    pull     d phi_i -> d x                       the chain rule
    score    phi(q)·phi(k) as a function of q·k   inside a chunk

Register tiles cannot be sliced by column, so the Taylor features x_i x_j are formed by SELECTION
PRODUCTS: with L, R `[64, 16]` holding one entry a row, `(x Lᵀ) * (x Rᵀ)` is a tile of 64 products,
and `(L xᵀ) * (R xᵀ)` the same transposed. Entries are powers of two, so both factors are exact in
bfloat16; only their product is rounded.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels.linear_attention.products import Operand, Products
from pallas_kernels.linear_attention.tiles import TILE, iota

class Rows(Protocol):
    """One slice of features of a tile of tokens."""

    operand: Operand
    """`[tokens, 64]` in bfloat16."""

    def pull(self, grads: tuple[jax.Array, ...], d_rows: jax.Array) -> tuple[jax.Array, ...]:
        """Adds the chain rule of `d_rows` to `grads`, the column tiles of d x."""
        ...


class Side(Protocol):
    """The feature map of queries, or of keys."""

    def rows(self, index: int, x) -> Rows:
        """`phi_i(x)`."""
        ...

    def columns(self, index: int | jax.Array, x) -> Operand:
        """`phi_i(x)ᵀ`, in float32 if formed here; the index may be known only when it runs."""
        ...


class FeatureMap(Protocol):
    """A feature map for vectors of one size.

    Attributes:
      size: features D.
      num_slices: slices of 64 features that hold them; the rest are zeros.
      gradient_widths: widths of the column tiles in which d x is summed.
      output_scale: factor of sums of values and of gradients, left out of everything else.
    """

    size: int
    num_slices: int
    gradient_widths: tuple[int, ...]
    output_scale: float

    def constants(self) -> tuple[np.ndarray, ...]:
        """Matrices that a kernel keeps in shared memory."""
        ...

    def score(self, dot: jax.Array) -> jax.Array:
        """The similarity, from q·k."""
        ...

    def slope(self, dot: jax.Array) -> jax.Array | float:
        """The derivative of `score`."""
        ...

    def bind(self, constants: tuple, products: Products) -> tuple[Side, Side]:
        """The maps of queries and of keys, inside a kernel that holds the constants."""
        ...


@dataclasses.dataclass(frozen=True)
class Taylor:
    """`1 + x + x²/2` of x = scale q·k, for F = 16.

    Packed, in this order: 1, the k_i, and k_i k_j for i <= j. Queries carry the weights 1, scale,
    and scale² (halved where i = j).

    Attributes:
      scale: a power of two, so that the weights are exact in bfloat16.
    """

    scale: float

    size = 1 + 16 + 16 * 17 // 2
    num_slices = 3
    gradient_widths = (16,)
    output_scale = 1.0

    def constants(self) -> tuple[np.ndarray, ...]:
        """Selections `[D, 16]`: left ones of queries and of keys, right ones of both."""
        i, j = np.triu_indices(16)
        eye = np.eye(16)
        weight = self.scale**2 * np.where(i == j, 0.5, 1.0)
        blank = np.zeros((1, 16))
        padding = np.zeros((TILE * self.num_slices - self.size, 16))
        query = np.concatenate([blank, self.scale * eye, weight[:, None] * eye[i], padding])
        key = np.concatenate([blank, eye, eye[i], padding])
        right = np.concatenate([blank, 0 * eye, eye[j], padding])
        return tuple(matrix.astype(jnp.bfloat16) for matrix in (query, key, right))

    def score(self, dot):  # noqa: D102
        return 1 + dot * (self.scale + dot * (self.scale**2 / 2))

    def slope(self, dot):  # noqa: D102
        return self.scale + dot * self.scale**2

    def bind(self, constants, products):  # noqa: D102
        left_query, left_key, right = constants
        return (
            _TaylorSide(left_query, right, products),
            _TaylorSide(left_key, right, products),
        )


@dataclasses.dataclass(frozen=True)
class _TaylorSide:
    left: Operand
    right: Operand
    products: Products

    def rows(self, index, x):
        left, right = self._selections(index)
        a, b = self.products.products(
            (x, left.transpose((1, 0))), (x, right.transpose((1, 0)))
        )
        a, b = self._constants(index, a, b, axis=1)
        return _TaylorRows(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), a * b, left, right, self.products)

    def columns(self, index, x):
        left, right = self._selections(index)
        a, b = self.products.products((left, x.transpose((1, 0))), (right, x.transpose((1, 0))))
        a, b = self._constants(index, a, b, axis=0)
        return a * b

    def _selections(self, index):
        return tuple(ref.at[pl.ds(index * TILE, TILE)] for ref in (self.left, self.right))

    def _constants(self, index, a, b, axis):
        """The factors that no selection gives: 1·1 of feature 0, and the 1 of k_i·1."""
        if isinstance(index, int) and index > 0:
            return a, b
        feature = index * TILE + iota(axis)
        return jnp.where(feature == 0, 1.0, a), jnp.where(feature <= 16, 1.0, b)


@dataclasses.dataclass(frozen=True)
class _TaylorRows:
    a: jax.Array
    b: jax.Array
    values: jax.Array
    left: Operand
    right: Operand
    products: Products

    @property
    def operand(self):
        return self.values.astype(jnp.bfloat16)

    def pull(self, grads, d_rows):
        # Constants have empty rows in the selections, so their factors' gradients vanish here.
        (grad,) = grads
        return (
            self.products.accumulate(
                grad,
                ((d_rows * self.b).astype(jnp.bfloat16), self.left),
                ((d_rows * self.a).astype(jnp.bfloat16), self.right),
            ),
        )


@dataclasses.dataclass(frozen=True)
class Identity:
    """`scale q·k`, for F a multiple of 64: features are read where they lie, in shared memory."""

    size: int
    output_scale: float

    @property
    def num_slices(self):  # noqa: D102
        return self.size // TILE

    @property
    def gradient_widths(self):  # noqa: D102
        return (TILE,) * self.num_slices

    def constants(self):  # noqa: D102
        return ()

    def score(self, dot):  # noqa: D102
        return dot

    def slope(self, dot):  # noqa: D102
        del dot
        return 1.0

    def bind(self, constants, products):  # noqa: D102
        del constants, products
        return _IdentitySide(), _IdentitySide()


@dataclasses.dataclass(frozen=True)
class _IdentitySide:
    def rows(self, index, x):
        return _IdentityRows(index, x.at[:, pl.ds(index * TILE, TILE)])

    def columns(self, index, x):
        return x.at[:, pl.ds(index * TILE, TILE)].transpose((1, 0))


@dataclasses.dataclass(frozen=True)
class _IdentityRows:
    index: int
    operand: Operand

    def pull(self, grads, d_rows):
        i = self.index
        return (*grads[:i], grads[i] + d_rows, *grads[i + 1 :])
