"""What a stream of routing attention remembers: the last tokens of each cluster."""

import dataclasses
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lcattn.ops import checks
from lcattn.ops.checks import Sizes
from lcattn.ops.visibility import Visibility
from lcattn.typing import Array, Float, Int


@no_type_check  # JAX also fills it with shapes and specs
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingAttentionState:
    """The last `cluster_size - 1` tokens of each cluster of each query head, newest last.

    Its size does not depend on the length of the stream.

    Attributes:
      k: `[B,N,C,R,F]`, normalised and encoded. Slots before a cluster's first token are unused.
      v: `[B,N,C,R,H]`; heads that share values still differ in who comes to their clusters.
      count: number of tokens that came to each cluster so far, `[B,N,C]` int32.
    """

    k: Float[Array, "B N C R F"]
    v: Float[Array, "B N C R H"]
    count: Int[Array, "B N C"]


def routing_attention_state(
    batch_size: int,
    num_heads: int,
    num_clusters: int,
    cluster_size: int,
    key_size: int,
    value_size: int,
    *,
    dtype: DTypeLike = jnp.float32,
) -> RoutingAttentionState:
    """The state before the first token.

    Args:
      batch_size: B.
      num_heads: N, query heads.
      num_clusters: C.
      cluster_size: tokens of a cluster that a token sees, itself included.
      key_size: F.
      value_size: H.
      dtype: that of k and v.
    """
    shape = (batch_size, num_heads, num_clusters, cluster_size - 1)
    return RoutingAttentionState(
        k=jnp.zeros((*shape, key_size), dtype),
        v=jnp.zeros((*shape, value_size), dtype),
        count=jnp.zeros(shape[:3], jnp.int32),
    )


def check_state(
    state: RoutingAttentionState, sizes: Sizes, *, num_clusters: int, cluster_size: int
) -> None:
    """Checks a state against a call."""
    shape = (sizes.B, sizes.N, num_clusters, cluster_size - 1)
    checks.check_shape("initial_state.k", state.k, (*shape, sizes.F), "[B,N,C,R,F]")
    checks.check_shape("initial_state.v", state.v, (*shape, sizes.H), "[B,N,C,R,H]")
    checks.check_shape("initial_state.count", state.count, shape[:3], "[B,N,C]")


class Extended(NamedTuple):
    """New tokens and what they see, cluster after cluster.

    Attributes:
      index: place among the new tokens of each query, `[B,N,1,T]`.
      k, v: old and new keys and values `[B·N,S,1,F]` and `[B·N,S,1,H]`.
      seen: which queries see which of them.
      state: after the new tokens.
    """

    index: Int[Array, "B N 1 T"]
    k: Float[Array, "b S 1 F"]
    v: Float[Array, "b S 1 H"]
    seen: Visibility
    state: RoutingAttentionState


def step(
    state: RoutingAttentionState,
    k: Float[Array, "B 1 N F"],
    v: Float[Array, "B 1 K H"],
    clusters: Int[Array, "B N 1"],
) -> Extended:
    """What `extend` gives for one new token, at the cost of its own cluster rather than of all."""
    B, N, _, R, _ = state.k.shape
    own = clusters[:, :, 0]

    def of_own(x: Array) -> Array:
        return jax.vmap(jax.vmap(lambda row, at: row[at]))(x, own)

    def put(x: Array, new: Array) -> Array:
        return jax.vmap(jax.vmap(lambda row, at, values: row.at[at].set(values)))(x, own, new)

    v = jnp.repeat(v, N // v.shape[2], axis=2)
    keys, values = (
        jnp.concatenate([of_own(old), new.swapaxes(1, 2).astype(old.dtype)], axis=2)
        for old, new in ((state.k, k), (state.v, v))
    )
    count = of_own(state.count)
    after = RoutingAttentionState(
        put(state.k, keys[:, :, 1:]), put(state.v, values[:, :, 1:]), put(state.count, count + 1)
    )
    begin = jnp.broadcast_to(jnp.arange(R + 1, dtype=jnp.int32), (B * N, R + 1))
    is_used = begin >= R - count.reshape(-1, 1)
    seen = Visibility(begin[:, R:], begin, jnp.where(is_used, R + 1, begin))
    keys, values = (x.reshape(B * N, R + 1, 1, -1).astype(k.dtype) for x in (keys, values))
    return Extended(jnp.zeros_like(clusters)[:, :, None], keys, values, seen, after)


def extend(
    state: RoutingAttentionState,
    k: Float[Array, "B T N F"],
    v: Float[Array, "B T K H"],
    clusters: Int[Array, "B N T"],
) -> Extended:
    """Appends each new token to its cluster.

    Old and new tokens are put in one list, cluster after cluster. There each of the R = size - 1
    remembered slots and of the new tokens is seen from its own place on for `size` places, which
    never reaches the next cluster: that one begins with R old slots of its own.
    """
    (B, N, C, R, _), T = state.k.shape, k.shape[1]
    v = jnp.repeat(v, N // v.shape[2], axis=2)
    old_clusters = jnp.broadcast_to(jnp.repeat(jnp.arange(C, dtype=jnp.int32), R), (B, N, C * R))
    order = _stable_order(jnp.concatenate([old_clusters, clusters], axis=-1))

    def listed(old: Array, new: Array) -> Array:
        old = old.reshape(B, N, C * R, *old.shape[4:])
        return _take(jnp.concatenate([old, new.astype(old.dtype)], axis=2), order)

    keys, values = listed(state.k, k.swapaxes(1, 2)), listed(state.v, v.swapaxes(1, 2))
    is_used = listed(jnp.arange(R) >= R - state.count[..., None], jnp.full((B, N, T), True))
    begin = jnp.broadcast_to(jnp.arange(C * R + T, dtype=jnp.int32), is_used.shape)
    index = _stable_order(clusters)
    queries = R * (_take(clusters, index) + 1) + jnp.arange(T, dtype=jnp.int32)
    seen = Visibility(queries, begin, jnp.where(is_used, begin + R + 1, begin))

    is_of = clusters[:, :, None] == jnp.arange(C)[:, None]
    new = jnp.sum(is_of, axis=-1, dtype=jnp.int32)
    ends = R * jnp.arange(1, C + 1, dtype=jnp.int32) + jnp.cumsum(new, axis=-1, dtype=jnp.int32)
    last = (ends[..., None] + jnp.arange(-R, 0, dtype=jnp.int32)).reshape(B, N, C * R)
    after = RoutingAttentionState(
        k=_take(keys, last).reshape(state.k.shape),
        v=_take(values, last).reshape(state.v.shape),
        count=state.count + new,
    )
    keys, values = (x.reshape(B * N, C * R + T, 1, -1).astype(k.dtype) for x in (keys, values))
    seen = Visibility(*(x.reshape(B * N, -1) for x in seen))
    return Extended(index[:, :, None], keys, values, seen, after)


def _stable_order(clusters: Int[Array, "B N S"]) -> Int[Array, "B N S"]:
    return jnp.argsort(clusters, axis=-1, stable=True).astype(jnp.int32)


def _take(x: Array, index: Int[Array, "B N S"]) -> Array:
    """`[B,N,S,...]` at indices along the third axis."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 3)), axis=2)
