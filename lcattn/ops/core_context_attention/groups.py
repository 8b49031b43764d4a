"""Groups of consecutive tokens: which there are, who sees them, and what stands for them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcattn.ops.checks import accumulation_dtype
from lcattn.ops.segments import dense_positions
from lcattn.ops.visibility import NEVER, Visibility
from lcattn.typing import Array, Float, Int


class Cores(NamedTuple):
    """One key and one value for each group; C is N, or K where heads share cores."""

    k: Float[Array, "B m C F"]
    v: Float[Array, "B m C H"]


class Views(NamedTuple):
    """Who sees what: a token until its group's core is seen instead, a core from then on."""

    tokens: Visibility
    cores: Visibility


def pool(
    queries: Float[Array, "B m N F"],
    keys: Float[Array, "B m g K F"],
    values: Float[Array, "B m g K H"],
    *,
    scale: float,
    share_cores: bool,
) -> Cores:
    """The softmax-weighted means of each group, scored by the query of its last token."""
    (B, m, N, F), K = queries.shape, keys.shape[3]
    dtype = accumulation_dtype(queries.dtype)
    queries = queries.reshape(B, m, K, N // K, F)
    if share_cores:
        queries = queries.astype(dtype).mean(axis=3, keepdims=True)
    scores = jnp.einsum("bmkqf,bmgkf->bmkqg", queries, keys, preferred_element_type=dtype)
    weights = jax.nn.softmax(scale * scores, axis=-1).astype(values.dtype)
    k, v = (
        jnp.einsum("bmkqg,bmgkh->bmkqh", weights, x, preferred_element_type=dtype)
        .reshape(B, m, K * queries.shape[3], x.shape[-1])
        .astype(x.dtype)
        for x in (keys, values)
    )
    return Cores(k, v)


def views(
    queries: Int[Array, "b T"],
    keys: Int[Array, "b S"],
    core_ends: Int[Array, "b m"],
    *,
    group_size: int,
    window: int,
    origin: Int[Array, "b S"] | int = 0,
    last: Int[Array, "b S"] | int = NEVER,
    core_last: Int[Array, "b m"] | int = NEVER,
) -> Views:
    """From positions: of queries, of keys (negative: none), of the last token of each core.

    A query at position p sees the core of a group that ends at e if e + window <= p, and the tokens
    of a group that ends later than that one by one. So each position up to p counts once.
    `origin` is the position of the first token of a key's document, `last` the one after its end.
    """
    ends = origin + ((keys - origin) // group_size + 1) * group_size - 1
    replaced = jnp.where(keys < 0, keys, jnp.minimum(ends + window, last))
    begin = jnp.minimum(core_ends + window, core_last)
    end = jnp.broadcast_to(jnp.asarray(core_last, jnp.int32), begin.shape)
    return Views(Visibility(queries, keys, replaced), Visibility(queries, begin, end))


class PackedGroups(NamedTuple):
    """The groups of packed documents.

    Attributes:
      members: index in the row of every token of every whole group.
      views: who sees what. Positions count the tokens of a row without its padding.
    """

    members: Int[Array, "B m g"]
    views: Views


def packed_groups(segment_ids: Int[Array, "B T"], group_size: int, window: int) -> PackedGroups:
    """Groups restart with each document; a row of T tokens has at most T // group_size whole ones.

    Slots that are left over hold tokens of no group, and are never seen.
    """
    B, T = segment_ids.shape
    count = T // group_size
    is_real = segment_ids >= 0
    position, origin, last = dense_positions(segment_ids)

    is_end = is_real & ((position - origin + 1) % group_size == 0)
    at = jnp.argsort(~is_end, axis=1, stable=True)[:, :count]  # the ends come first
    is_group, core_ends, core_last = (
        jnp.take_along_axis(x, at, axis=1) for x in (is_end, position, last)
    )
    by_position = jnp.argsort(~is_real, axis=1, stable=True)
    members = core_ends[..., None] + jnp.arange(1 - group_size, 1, dtype=jnp.int32)
    members = jnp.clip(members, 0, T - 1).reshape(B, count * group_size)
    members = jnp.take_along_axis(by_position, members, axis=1).reshape(B, count, group_size)
    seen = views(
        position, position, core_ends,
        group_size=group_size, window=window, origin=origin, last=last,
        core_last=jnp.where(is_group, core_last, 0),
    )  # fmt: skip
    return PackedGroups(members, seen)


def take(x: Array, index: Int[Array, "B m ..."]) -> Array:
    """`[B,T,K,H]` at indices `[B,m,...]` of its tokens."""
    return jax.vmap(lambda row, at: row[at])(x, index)
