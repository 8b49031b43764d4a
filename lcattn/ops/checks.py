"""Checks that every op makes of its arrays, with errors that name the argument.

Shapes and dtypes are known while tracing, so these checks cost nothing in a compiled program.
Values are checked only where they are concrete: `jit` cannot raise.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from lcattn.errors import argument_error
from lcattn.typing import Array


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Axis sizes of one call, in the alphabet of `lcattn.typing`."""

    B: int
    T: int
    S: int
    N: int
    K: int
    F: int
    H: int

    @property
    def groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.N // self.K


def check_heads(q: Array, k: Array | None, v: Array, segment_ids: Array | None = None) -> Sizes:
    """Checks queries `[B,T,N,F]`, keys `[B,S,K,F]` and values `[B,S,K,H]` against each other.

    Where `k` is None the queries are the keys, and T = S.

    Raises:
      ValueError: naming the first argument that does not fit, what was expected and what came.
    """
    keys = {} if k is None else {"k": (k, "[B,S,K,F]")}
    arrays = {"q": (q, "[B,T,N,F]"), **keys, "v": (v, "[B,S,K,H]")}
    for name, (array, axes) in arrays.items():
        check_array(name, array, axes)
        if array.ndim != 4:
            raise argument_error(name, f"4 axes {axes}", f"shape {array.shape}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise argument_error(name, "a floating-point dtype", array.dtype)
        if 0 in array.shape[1:]:
            raise argument_error(name, f"no empty axis in {axes} but B", f"shape {array.shape}")
        if array.dtype != q.dtype:
            raise argument_error(name, f"the dtype of q, {q.dtype}", array.dtype)
    (B, T, N, F), H = q.shape, v.shape[3]
    if k is None:
        S, K = T, v.shape[2]
        if v.shape != (B, S, K, H):
            raise argument_error("v", f"B={B} and T={T} as in q {q.shape}", f"shape {v.shape}")
    else:
        S, K = k.shape[1:3]
        if k.shape != (B, S, K, F):
            raise argument_error("k", f"B={B} and F={F} as in q {q.shape}", f"shape {k.shape}")
        if v.shape != (B, S, K, H):
            raise argument_error("v", f"B, S, K = {(B, S, K)} as in k", f"shape {v.shape}")
    if N % K:
        name = "v" if k is None else "k"
        raise argument_error(name, f"a number of heads K that divides the N={N} of q", f"K={K}")
    if segment_ids is not None:
        if T != S:
            raise argument_error("segment_ids", "as many queries as keys", f"T={T}, S={S}")
        check_segment_ids(segment_ids, (B, T))
    return Sizes(B=B, T=T, S=S, N=N, K=K, F=F, H=H)


def check_segment_ids(segment_ids: Array, shape: tuple[int, int]) -> None:
    """Checks shape and dtype and, outside `jit`, that ids never decrease along a row."""
    check_array("segment_ids", segment_ids, "[B,T]")
    if segment_ids.shape != shape:
        raise argument_error("segment_ids", f"shape [B,T] = {shape}", f"{segment_ids.shape}")
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise argument_error("segment_ids", "an integer dtype", segment_ids.dtype)
    if isinstance(segment_ids, jax.core.Tracer):
        return
    for row, ids in enumerate(np.asarray(segment_ids)):
        documents = ids[ids >= 0]
        if np.any(np.diff(documents) < 0):
            raise argument_error(
                "segment_ids", "ids that never decrease along a row (negative: padding)",
                f"row {row} = {_shorten(ids)}",
            )  # fmt: skip


def check_array(name: str, value: object, axes: str) -> None:
    """Checks that a value is an array at all, and no list, say."""
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise argument_error(name, f"an array {axes}", type(value).__name__)


def check_shape(name: str, array: Array, shape: tuple[int, ...], axes: str) -> None:
    """Checks one array's shape, spelled as `axes` in the error."""
    if array.shape != shape:
        raise argument_error(name, f"shape {axes} = {shape}", f"{array.shape}")


def check_size(name: str, value: object) -> None:
    """Checks an option that counts something: a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise argument_error(name, "a whole number of at least 1", repr(value))


def resolve_query_position(
    position: int | Array | None,
    sizes: Sizes,
    *,
    causal: bool,
    segment_ids: Array | None,
    key_position: int | Array = 0,
) -> int | Array:
    """The position of the first query. Default: the queries are the last T of the S tokens."""
    aligned = position is None and isinstance(key_position, int) and key_position == 0
    if segment_ids is not None and not aligned:
        raise argument_error("segment_ids", "None where positions are given", "both")
    if position is not None:
        return position
    if causal and aligned and sizes.T > sizes.S:
        raise argument_error("q", f"at most S={sizes.S} queries when causal", f"T={sizes.T}")
    return key_position + sizes.S - sizes.T


def resolve_scale(scale: float | None, size: int) -> float:
    """The given scale, or `size ** -0.5`."""
    if scale is None:
        return size**-0.5
    if isinstance(scale, jax.core.Tracer) or not math.isfinite(scale):
        raise argument_error("scale", "a finite Python float (fold learned scales into q)", scale)
    return float(scale)


def check_room(new: int, slots: int, length: Array) -> None:
    """Raises where new tokens do not fit behind the `length` that a state of `slots` holds."""
    if not isinstance(length, jax.core.Tracer) and int(length) + new > slots:
        raise argument_error("state", f"room for {int(length) + new} tokens", f"max_length={slots}")
    if new > slots:
        raise argument_error("x", f"at most max_length={slots} tokens", new)


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of sums and states: float32, or float64 for float64 inputs."""
    return jnp.promote_types(dtype, jnp.float32)


def _shorten(ids: np.ndarray) -> str:
    return np.array2string(ids, threshold=16, separator=",")
