r"""Feature maps as the TPU kernels compute them: on tiles `[F, C]`, tokens along lanes.

The pairs x_i x_j of the Taylor map are products of a tile with itself rolled along the features:
x * roll(x, d) holds the x_i x_(i-d), indices modulo F. Shifts 0..F/2 give every pair, those of F/2
twice. Every tile stays aligned, and 144 rows stand for the 136 pairs of F = 16.
"""

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import PACKED_SUBLANES


class FeatureMap(Protocol):
    """A similarity p(q, k) = phi(q)·phi(k), and the gradient of phi."""

    @property
    def size(self) -> int:
        """Features in the kernel, D."""
        ...

    def score(self, dot: jax.Array) -> jax.Array:
        """The similarity, from q·k."""
        ...

    def slope(self, dot: jax.Array) -> jax.Array | float:
        """The derivative of `score`."""
        ...

    def queries(self, x: jax.Array) -> jax.Array:
        """`phi(q)` `[D,C]` in float32, of q `[F,C]`."""
        ...

    def keys(self, x: jax.Array) -> jax.Array:
        """`phi(k)`."""
        ...

    def pull_queries(self, x: jax.Array, d_rows: jax.Array) -> jax.Array:
        """The gradient of q `[F,C]`, from that of `queries(q)`."""
        ...

    def pull_keys(self, x: jax.Array, d_rows: jax.Array) -> jax.Array:
        """The gradient of k."""
        ...

    def to_kernel(self, state: jax.Array) -> jax.Array:
        """A state `[...,features,W]` with the kernel's features, from one with those outside."""
        ...

    def from_kernel(self, state: jax.Array) -> jax.Array:
        """Undoes `to_kernel`."""
        ...


@dataclasses.dataclass(frozen=True)
class Taylor:
    """`1 + x + x²/2` of x = scale q·k.

    Outside, features are 1, the k_i, and k_i k_j for i <= j. In the kernel, the pairs by shift, the
    k_i, and a tile of which one row is 1 and the others 0. Queries carry all weights.

    Attributes:
      F: the size of q and k.
      scale: as above.
    """

    F: int
    scale: float

    @property
    def size(self) -> int:
        """Features in the kernel."""
        return self.F * (self.F // 2 + 2) + PACKED_SUBLANES

    def score(self, dot):
        """`1 + x + x²/2`."""
        return 1 + dot * (self.scale + dot * (self.scale**2 / 2))

    def slope(self, dot):
        """The derivative of `score`."""
        return self.scale + dot * self.scale**2

    def queries(self, x):
        """`phi(q)`."""
        x = x.astype(jnp.float32)
        pairs = [
            (self._weight(shift) * x) * self._rolled(x, shift) for shift in range(self.F // 2 + 1)
        ]
        return self._stacked(pairs, self.scale * x)

    def keys(self, x):
        """`phi(k)`."""
        x = x.astype(jnp.float32)
        return self._stacked([x * self._rolled(x, shift) for shift in range(self.F // 2 + 1)], x)

    def pull_queries(self, x, d_rows):
        """The gradient of q."""
        weights = [self._weight(shift) for shift in range(self.F // 2 + 1)]
        return self._pulled(x, d_rows, weights, self.scale)

    def pull_keys(self, x, d_rows):
        """The gradient of k."""
        return self._pulled(x, d_rows, [1.0] * (self.F // 2 + 1), 1.0)

    def to_kernel(self, state):
        """A state with the kernel's features."""
        rows = state[..., self._places, :]
        padding = ((0, 0),) * (state.ndim - 2) + ((0, PACKED_SUBLANES - 1), (0, 0))
        return jnp.pad(rows, padding)

    def from_kernel(self, state):
        """A state with the features outside."""
        _, first = np.unique(self._places, return_index=True)
        return state[..., first, :]

    @functools.cached_property
    def _places(self) -> np.ndarray:
        """Which feature outside each row of the kernel's is, but for the zeros at the end."""
        row, column = np.triu_indices(self.F)
        pair = np.zeros((self.F, self.F), int)
        pair[row, column] = pair[column, row] = 1 + self.F + np.arange(row.size)
        i = np.arange(self.F)
        shifts = [pair[i, (i - shift) % self.F] for shift in range(self.F // 2 + 1)]
        return np.concatenate([*shifts, 1 + i, [0]])

    def _weight(self, shift: int) -> float:
        """Of a pair, on the side of queries: squares, and pairs that come twice, count half."""
        return self.scale**2 * (0.5 if shift in (0, self.F // 2) else 1.0)

    def _rolled(self, x: jax.Array, shift: int) -> jax.Array:
        return pltpu.roll(x, shift % self.F, 0) if shift % self.F else x

    def _stacked(self, pairs: list[jax.Array], first_order: jax.Array) -> jax.Array:
        row = lax.broadcasted_iota(jnp.int32, (PACKED_SUBLANES, first_order.shape[1]), 0)
        one = jnp.where(row == 0, 1.0, 0.0)
        return jnp.concatenate([*pairs, first_order, one])

    def _pulled(self, x, d_rows, weights, first_weight):
        x = x.astype(jnp.float32)
        F = self.F
        grad = first_weight * d_rows[len(weights) * F : (len(weights) + 1) * F]
        for shift, weight in enumerate(weights):
            d_pair = weight * d_rows[shift * F : (shift + 1) * F]
            grad += d_pair * self._rolled(x, shift) + self._rolled(d_pair * x, -shift)
        return grad


@dataclasses.dataclass(frozen=True)
class Identity:
    """`scale q·k`: the features are the vectors themselves.

    Attributes:
      F: the size of q and k.
      scale: as above; queries carry it.
    """

    F: int
    scale: float

    @property
    def size(self) -> int:
        """Features."""
        return self.F

    def score(self, dot):
        """`scale q·k`."""
        return self.scale * dot

    def slope(self, dot):
        """The derivative of `score`."""
        del dot
        return self.scale

    def queries(self, x):
        """`phi(q)`."""
        return self.scale * x.astype(jnp.float32)

    def keys(self, x):
        """`phi(k)`."""
        return x.astype(jnp.float32)

    def pull_queries(self, x, d_rows):
        """The gradient of q."""
        del x
        return self.scale * d_rows

    def pull_keys(self, x, d_rows):
        """The gradient of k."""
        del x
        return d_rows

    def to_kernel(self, state):
        """The state itself."""
        return state

    def from_kernel(self, state):
        """The state itself."""
        return state
