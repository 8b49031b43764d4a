r"""Feature maps as kernels compute them: 64 features at a time, in registers.

For a tile x `[64 tokens, F]` in shared memory, and slice i of 64 features, a kernel needs

    rows     phi_i(x)  [64 tokens, 64 features]   left operand of phi(x) S
    columns  phi_i(x)ᵀ [64 features, 64 tokens]   left operand of S += phi(x)ᵀ w
    score    phi(q)·phi(k) as a function of q·k   inside a chunk

A single column of a register tile cannot be picked out, so the Taylor features x_i x_j are formed
by SELECTION PRODUCTS: with L, R `[64, 16]` holding one entry a row, `(x Lᵀ) * (x Rᵀ)` is a tile of
64 features, and `(L xᵀ) * (R xᵀ)` the same transposed. L lies on R in shared memory, so that both
are one product. Entries are powers of two, so that both factors are exact.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.products import Operand, Pair, Products
from pallas_kernels.tiles import TILE, WGMMA, iota, over_columns, over_rows, unknown_zero


class Rows(Protocol):
    """A slice of features of a tile of tokens, one token a row."""

    @property
    def operand(self) -> Operand:
        """In bfloat16, for the matrix unit."""
        ...

    def dot(self, totals: jax.Array) -> jax.Array:
        """`phi_i(x)·totals` of each token, in float32."""
        ...


class Columns(Protocol):
    """A slice of features of a tile of tokens, one token a column."""

    @property
    def operand(self) -> Operand:
        """In bfloat16, for the matrix unit."""
        ...

    def summed(self, weights: jax.Array | None) -> jax.Array:
        """Features summed over tokens, in float32, with weights of tokens along columns (1)."""
        ...


class Side(Protocol):
    """The feature map of queries, or of keys.

    Features may take a product of the matrix unit, which is made by who asks for them, at a time
    when another one is in flight. A constant feature is the weight of its token: None for 1.
    """

    def row_product(self, index: int, x) -> Pair | None:
        """The product that `rows` takes."""
        ...

    def rows(self, index: int, x, product: Any, weights: jax.Array | None = None) -> Rows:
        """`phi_i(x)`; weights lie along rows."""
        ...

    def column_product(self, index: int, x) -> Pair | None:
        """The product that `columns` takes."""
        ...

    def columns(self, index: int, x, product: Any, weights: jax.Array | None = None) -> Columns:
        """`phi_i(x)ᵀ`; weights lie along columns."""
        ...


class FeatureMap(Protocol):
    """A feature map for vectors of one size."""

    @property
    def size(self) -> int:
        """Features D."""
        ...

    @property
    def num_slices(self) -> int:
        """Slices of 64 features that hold them; what is over are zeros."""
        ...

    @property
    def output_scale(self) -> float:
        """A factor of the similarity, left out of everything but what leaves a kernel."""
        ...

    def constants(self) -> tuple[np.ndarray, ...]:
        """Matrices that a kernel keeps in shared memory: as many rows for each slice."""
        ...

    def score(self, dot: jax.Array) -> jax.Array:
        """The similarity, from q·k."""
        ...

    def slope(self, dot: jax.Array) -> jax.Array | float:
        """The derivative of `score`."""
        ...

    def bind(
        self, constants: tuple, products: Products, first: int | jax.Array
    ) -> tuple[Side, Side]:
        """The maps of queries and of keys, inside a kernel.

        Args:
          constants: the rows of `constants()` for the kernel's slices, in shared memory.
          products: the matrix unit.
          first: the kernel's first slice, perhaps known only when it runs; indices count from it.
        """
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
    output_scale = 1.0

    def constants(self) -> tuple[np.ndarray, ...]:
        """Selections of queries and of keys, `[384, 16]`: 64 rows of L, 64 of R, for each slice."""
        i, j = np.triu_indices(16)
        eye = np.eye(16)
        weight = self.scale**2 * np.where(i == j, 0.5, 1.0)
        one, rest = np.zeros((1, 16)), np.zeros((TILE * self.num_slices - self.size, 16))
        query = np.concatenate([one, self.scale * eye, weight[:, None] * eye[i], rest])
        key = np.concatenate([one, eye, eye[i], rest])
        right = np.concatenate([one, 0 * eye, eye[j], rest])

        def stacked(left):
            slices = (-1, TILE, 16)
            pairs = np.stack([left.reshape(slices), right.reshape(slices)], axis=1)
            return pairs.reshape(-1, 16).astype(jnp.bfloat16)

        return stacked(query), stacked(key)

    def score(self, dot):
        """`1 + x + x²/2`."""
        return 1 + dot * (self.scale + dot * (self.scale**2 / 2))

    def slope(self, dot):
        """The derivative of `score`."""
        return self.scale + dot * self.scale**2

    def bind(self, constants, products, first) -> tuple["TaylorSide", "TaylorSide"]:
        """The maps of queries and of keys."""
        query, key = constants
        return TaylorSide(query, products, first), TaylorSide(key, products, first)


@dataclasses.dataclass(frozen=True)
class TaylorSide:
    """The map of queries or of keys, and its chain rule.

    Attributes:
      selections: L and R of the kernel's slices.
      products: the matrix unit.
      first: the kernel's first slice.
    """

    selections: Operand
    products: Products
    first: int | jax.Array

    def row_product(self, index, x):
        """Both factors of `rows`."""
        return x, self._selection(index).transpose((1, 0))

    def rows(self, index, x, product, weights=None) -> "_Pairs":
        """`phi_i(x)`."""
        del x
        a, b = product[:, :TILE], product[:, TILE:]
        return _Pairs(self._left(index, a, 1, weights), self._right(index, b, 1))

    def column_product(self, index, x):
        """Both factors of `columns`."""
        return self._selection(index), x.transpose((1, 0))

    def columns(self, index, x, product, weights=None) -> "_Pairs":
        """`phi_i(x)ᵀ`."""
        del x
        a, b = product[:TILE], product[TILE:]
        return _Pairs(self._left(index, a, 0, weights), self._right(index, b, 0))

    def pull(self, index, x, past: Pair, then, grad: jax.Array) -> jax.Array:
        """`grad`, the gradient of x `[64, 16]`, plus the chain rule of `rows`.

        Args:
          index: the slice.
          x: the tokens.
          past: the gradient of the features is what `then` makes of this product.
          then: see there.
          grad: the sum so far.
        """
        # A factor at a time: both, and the gradient, would be half of all registers. What ones come
        # from are empty rows of L and R, so that nothing comes of their gradient.
        both = self._selection(index)
        left, right = both.at[pl.ds(0, TILE)], both.at[pl.ds(TILE, TILE)]
        d_rows, b = self.products.products(past, (x, right.transpose((1, 0))), then)
        d_a = (d_rows * self._right(index, b, 1)).astype(x.dtype)
        grad, a = self.products.accumulate_beside(grad, d_a, left, (x, left.transpose((1, 0))))
        d_b = (d_rows * self._left(index, a, 1, None)).astype(x.dtype)
        return self.products.accumulate(grad, d_b, right)

    def _selection(self, index):
        return self.selections.at[pl.ds((unknown_zero() + index) * 2 * TILE, 2 * TILE)]

    def _left(self, index, a, axis, weights):
        """With the factor that no selection gives: 1, or a weight, of feature 0."""
        if self._has_no_ones(index):
            return a
        over = over_columns if axis == 1 else over_rows
        return jnp.where(
            self._feature(index, axis) == 0, 1.0 if weights is None else over(weights), a
        )

    def _right(self, index, b, axis):
        """With the factors that no selection gives: 1 of feature 0 and of the k_i."""
        return (
            b if self._has_no_ones(index) else jnp.where(self._feature(index, axis) <= 16, 1.0, b)
        )

    def _has_no_ones(self, index) -> bool:
        return isinstance(self.first, int) and self.first + index > 0

    def _feature(self, index, axis):
        return (self.first + index) * TILE + iota(axis)


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """Features `a * b`.

    Multiplied in float32 although the factors are exact in bfloat16: packed bfloat16 arithmetic on
    what products have just given makes ptxas serialise them (C7514).
    """

    a: jax.Array
    b: jax.Array

    @property
    def operand(self) -> jax.Array:
        return self._values.astype(jnp.bfloat16)

    def dot(self, totals):
        return (self._values * over_rows(totals)).sum(axis=1)

    def summed(self, weights):
        values = self._values
        return (values if weights is None else values * over_rows(weights)).sum(axis=1)

    @property
    def _values(self):
        return self.a * self.b


@dataclasses.dataclass(frozen=True)
class Identity:
    """`scale q·k`: features are the vectors themselves, read where they lie in shared memory.

    Attributes:
      size: F, a multiple of 64.
      output_scale: scale.
      normalized: whether features are summed.
      has_constant: whether there is one more feature, weights of tokens, in a slice of its own.
    """

    size: int
    output_scale: float = 1.0
    normalized: bool = False
    has_constant: bool = False

    @property
    def num_slices(self) -> int:
        """Slices of 64 features."""
        return self.size // TILE + self.has_constant

    def constants(self) -> tuple[np.ndarray, ...]:
        """Where features are summed, a column of ones: the matrix unit sums over tokens."""
        ones = np.eye(1, 16).repeat(self.num_slices * TILE, axis=0)
        return (ones.astype(jnp.bfloat16),) if self.normalized else ()

    def score(self, dot):
        """`q·k`."""
        return dot

    def slope(self, dot):
        """The derivative of `score`."""
        del dot
        return 1.0

    def bind(self, constants, products, first) -> tuple["_IdentitySide", "_IdentitySide"]:
        """The maps of queries and of keys."""
        ones = constants[0].at[pl.ds(0, TILE)] if constants else None
        side = _IdentitySide(self.size // TILE, first, products, ones)
        return side, side


@dataclasses.dataclass(frozen=True)
class _IdentitySide:
    num_slices: int  # without that of a constant
    first: int | jax.Array
    products: Products
    ones: Operand

    def row_product(self, index, x):
        return None

    def rows(self, index, x, product, weights=None):
        if self._is_constant(index):
            one = 1.0 if weights is None else over_columns(weights)
            return _Constant(jnp.where(iota(1) == 0, one, 0.0).astype(x.dtype))
        return _Slice(self._columns_of(index, x), self.products, self.ones)

    def column_product(self, index, x):
        return None

    def columns(self, index, x, product, weights=None):
        if self._is_constant(index):
            one = 1.0 if weights is None else over_rows(weights)
            return _Constant(jnp.where(iota(0) == 0, one, 0.0).astype(x.dtype))
        return _Slice(self._columns_of(index, x).transpose((1, 0)), self.products, self.ones)

    def _is_constant(self, index) -> bool:
        return isinstance(self.first, int) and self.first + index == self.num_slices

    def _columns_of(self, index, x):
        return x.at[:, pl.ds((self.first + index) * TILE, TILE)]


@dataclasses.dataclass(frozen=True)
class _Constant:
    """Never summed: it is there where outputs are not normalised."""

    operand: jax.Array

    def dot(self, totals):
        raise NotImplementedError

    def summed(self, weights):
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class _Slice:
    operand: Operand
    products: Products
    ones: Operand

    def dot(self, totals):
        values = plgpu.load(self.operand, layout=WGMMA).astype(jnp.float32)
        return (values * over_rows(totals)).sum(axis=1)

    def summed(self, weights):
        assert weights is None  # those of tokens that do not write: their features are zeros
        return self.products.product(self.operand, self.ones).sum(axis=1)
