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
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels.products import Operand, Products
from pallas_kernels.tiles import TILE, iota


class Features(Protocol):
    """One slice of features of a tile of tokens, or its transpose."""

    @property
    def operand(self) -> Operand:
        """In bfloat16, for the matrix unit."""
        ...

    @property
    def values(self) -> jax.Array:
        """In float32, for the normaliser."""
        ...


class Side(Protocol):
    """The feature map of queries, or of keys."""

    def rows(self, index: int, x) -> Features:
        """`phi_i(x)`."""
        ...

    def columns(self, index: int, x) -> Features:
        """`phi_i(x)ᵀ`."""
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

    def rows(self, index, x) -> "_Pairs":
        """`phi_i(x)`."""
        both = self.products.product(x, self._selection(index).transpose((1, 0)))
        return _Pairs(*_with_ones(self.first + index, both[:, :TILE], both[:, TILE:], axis=1))

    def columns(self, index, x) -> "_Pairs":
        """`phi_i(x)ᵀ`."""
        both = self.products.product(self._selection(index), x.transpose((1, 0)))
        return _Pairs(*_with_ones(self.first + index, both[:TILE], both[TILE:], axis=0))

    def pull(self, index, x, d_rows: jax.Array, grad: jax.Array) -> jax.Array:
        """`grad`, the gradient of x `[64, 16]`, plus the chain rule of that of `rows(index, x)`."""
        pairs = self.rows(index, x)
        # Ones come from no selection: their rows of L and R are empty.
        both = jnp.concatenate(
            [(d_rows * pairs.b).astype(x.dtype), (d_rows * pairs.a).astype(x.dtype)], axis=1
        )
        return self.products.accumulate(grad, both, self._selection(index))

    def _selection(self, index):
        return self.selections.at[pl.ds(index * 2 * TILE, 2 * TILE)]


def _with_ones(index, a, b, axis):
    """The factors that no selection gives: 1·1 of feature 0, and the 1 of k_i·1."""
    if isinstance(index, int) and index > 0:
        return a, b
    feature = index * TILE + iota(axis)
    return jnp.where(feature == 0, 1.0, a), jnp.where(feature <= 16, 1.0, b)


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """Features `a * b`.

    Multiplied in float32 although the factors are exact in bfloat16: packed bfloat16 arithmetic on
    what products have just given makes ptxas serialise them (C7514).
    """

    a: jax.Array
    b: jax.Array

    @property
    def operand(self):
        return self.values.astype(jnp.bfloat16)

    @property
    def values(self):
        return self.a * self.b


@dataclasses.dataclass(frozen=True)
class Identity:
    """`scale q·k`: features are the vectors themselves, read where they lie in shared memory.

    Attributes:
      size: F, a multiple of 64.
      output_scale: scale.
    """

    size: int
    output_scale: float

    @property
    def num_slices(self) -> int:
        """Slices of 64 features."""
        return self.size // TILE

    def constants(self) -> tuple[np.ndarray, ...]:
        """None."""
        return ()

    def score(self, dot):
        """`q·k`."""
        return dot

    def slope(self, dot):
        """The derivative of `score`."""
        del dot
        return 1.0

    def bind(self, constants, products, first) -> tuple["_IdentitySide", "_IdentitySide"]:
        """The maps of queries and of keys."""
        del constants, products
        return _IdentitySide(first), _IdentitySide(first)


@dataclasses.dataclass(frozen=True)
class _IdentitySide:
    first: int | jax.Array

    def rows(self, index, x) -> "_Slice":
        return _Slice(self._columns_of(index, x))

    def columns(self, index, x) -> "_Slice":
        return _Slice(self._columns_of(index, x).transpose((1, 0)))

    def _columns_of(self, index, x):
        return x.at[:, pl.ds((self.first + index) * TILE, TILE)]


@dataclasses.dataclass(frozen=True)
class _Slice:
    operand: Operand

    @property
    def values(self):
        raise NotImplementedError("the identity map is not normalised")
