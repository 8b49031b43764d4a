"""The walk over blocks of queries and keys: exact T·S attention in O(T) memory, in plain JAX.

Each block of queries visits the blocks of keys that any of its queries sees; what is done there is
the caller's. Arrays inside are `[B, K, G, T, H]` for queries and `[B, K, S, H]` for keys and
values, where the G = N/K query heads of a group share a key head; statistics of rows are
`[B, K, G, T]`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from lcattn.ops import dispatch
from lcattn.ops.visibility import NEVER, Visibility
from lcattn.typing import Array, Bool

# Tokens a block; see benchmarks/. A GPU pays for every step of a loop, a CPU for every score that
# causality hides.
_BLOCK = {"cpu": 256, "gpu": 1024, "tpu": 512}


def default_block() -> int:
    """Tokens a block on the platform of a computation traced now."""
    return _BLOCK[dispatch.default_platform()]


def pad(x: Array, multiple: int, axis: int, **options) -> Array:
    """Lengthens an axis to a multiple; `options` as those of `jnp.pad`, which fills with zeros."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, **options)


def group_queries(x: Array, num_kv_heads: int, block: int) -> Array:
    """`[B,T,N,H] -> [B,K,G,T,H]`, T padded to whole blocks."""
    B, T, N, H = x.shape
    x = x.reshape(B, T, num_kv_heads, N // num_kv_heads, H)
    return pad(x.transpose(0, 2, 3, 1, 4), block, 3)


def group_keys(x: Array, block: int) -> Array:
    """`[B,S,K,H] -> [B,K,S,H]`, S padded to whole blocks."""
    return pad(x.transpose(0, 2, 1, 3), block, 2)


def ungroup(x: Array, length: int) -> Array:
    """`[B,K,G,T,...] -> [B,T,N,...]`, without the padding."""
    x = jnp.moveaxis(x[:, :, :, :length], 3, 1)
    B, T, K, G, *rest = x.shape
    return x.reshape(B, T, K * G, *rest)


def pad_visibility(seen: Visibility, t_block: int, s_block: int) -> Visibility:
    """Whole blocks; the keys added are never seen."""
    return Visibility(
        pad(seen.queries, t_block, 1, mode="edge"),
        pad(seen.begin, s_block, 1, constant_values=NEVER),
        pad(seen.end, s_block, 1, constant_values=NEVER),
    )


class Walk:
    """Which blocks of keys each block of queries visits, and how to cut and join blocks."""

    def __init__(self, visibility: Visibility, t_block: int, s_block: int):
        """Args: a `visibility` of whole blocks; `t_block` and `s_block`, their sizes."""
        self.visibility, self.t_block, self.s_block = visibility, t_block, s_block
        queries, begin, end = visibility
        t_blocks = queries.reshape(len(queries), queries.shape[1] // t_block, 1, t_block)
        begins, ends = (x.reshape(len(x), 1, x.shape[1] // s_block, s_block) for x in (begin, end))
        newest = jnp.max(t_blocks, axis=-1)
        oldest = jnp.min(jnp.where(t_blocks < 0, newest[..., None], t_blocks), axis=-1)
        visited = (jnp.min(begins, axis=-1) <= newest) & (oldest < jnp.max(ends, axis=-1))
        visited = jnp.any(visited, axis=0)
        # The blocks to visit come first, in their order.
        self.order = jnp.argsort(~visited, axis=1, stable=True).astype(jnp.int32)
        self.visits = jnp.sum(visited, axis=1, dtype=jnp.int32)

    def over_queries[Carry, Rows](
        self, step: Callable[[Carry, Array], tuple[Carry, Rows]], start: Carry
    ) -> tuple[Carry, Rows]:
        """Runs `step(carry, i)` on every block of queries; joins the rows that it gives."""
        carry, rows = lax.scan(step, start, jnp.arange(len(self.visits), dtype=jnp.int32))
        return carry, jax.tree.map(_join, rows)

    def over_keys[Carry](
        self, i: Array, step: Callable[[Array, Carry], Carry], start: Carry
    ) -> Carry:
        """Runs `step(j, carry)` on every block of keys that queries of block i see."""
        return lax.fori_loop(0, self.visits[i], lambda n, c: step(self.order[i, n], c), start)

    def queries(self, x: Array, i: Array) -> Array:
        """Block i of `[B,K,G,T,...]`."""
        return _block(x, i, self.t_block, 3)

    def keys(self, x: Array, j: Array) -> Array:
        """Block j of `[B,K,S,...]`."""
        return _block(x, j, self.s_block, 2)

    def add_keys(self, x: Array, update: Array, j: Array) -> Array:
        """Adds to block j of `[B,K,S,...]`."""
        updated = self.keys(x, j) + update
        return lax.dynamic_update_slice_in_dim(x, updated, j * self.s_block, axis=2)

    def seen(self, i: Array, j: Array) -> Bool[Array, "b 1 1 t s"]:
        """Which pairs of a block of queries and a block of keys count."""
        queries, begin, end = self.visibility
        block = Visibility(
            _block(queries, i, self.t_block, 1),
            _block(begin, j, self.s_block, 1),
            _block(end, j, self.s_block, 1),
        )
        return block.mask()[:, None, None]


def product(spec: str, x: Array, y: Array, dtype: jnp.dtype) -> Array:
    """A matrix product summed in `dtype`."""
    return jnp.einsum(spec, x, y, preferred_element_type=dtype)


scores = functools.partial(product, "bkgth,bksh->bkgts")
mix = functools.partial(product, "bkgts,bksh->bkgth")
unmix = functools.partial(product, "bkgts,bkgth->bksh")


def _block(x: Array, index: Array, size: int, axis: int) -> Array:
    return lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _join(x: Array) -> Array:
    """`[blocks, B, K, G, t, ...] -> [B, K, G, blocks · t, ...]`."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], x.shape[3] * x.shape[4], *x.shape[5:])
