"""Attention within lists of tokens: gathered, attended as short sequences, and put back."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from lcattn.ops.checks import accumulation_dtype
from lcattn.ops.routing_attention.members import Members
from lcattn.ops.visibility import Visibility
from lcattn.typing import Array, Float, Int

Attend = Callable[[Array, Array, Array, Visibility, float], Array]
"""Softmax attention `(q, k, v, visibility, scale) -> out` of arrays `[b,M,1,H]`."""


def attend_within(
    x: Float[Array, "B T N F"],
    v: Float[Array, "B T K H"],
    members: Members,
    *,
    scale: float,
    attend: Attend,
) -> Float[Array, "B T N H"]:
    """The mean, over the lists that a token is in, of its attention to what it sees there.

    Tokens of no list get zeros. As many lists are worked on at a time as hold T tokens together;
    where that takes several turns, the backward pass recomputes them. So memory is O(T·H), beside
    the lists themselves.
    """
    T, (lists, length) = x.shape[1], members.index.shape[2:]

    def turn(members: Members) -> Float[Array, "B T N H"]:
        q, values = (gather(rows, members.index) for rows in (x, v))
        return scatter(attend(q, q, values, joined(members.seen), scale), members.index, T)

    at_once = max(n for n in range(1, lists + 1) if lists % n == 0 and (n == 1 or n * length <= T))
    if at_once == lists:
        total = turn(members)
    else:
        turns = jax.tree.map(lambda rows: _cut(rows, at_once), members)
        recomputed = jax.checkpoint(turn)
        # zeros_like of a product inherits what shard_map knows of x and v.
        heads = jnp.repeat(v, x.shape[2] // v.shape[2], axis=2)
        start = jnp.zeros_like(x[..., :1] * heads, accumulation_dtype(x.dtype))
        total, _ = lax.scan(lambda sums, part: (sums + recomputed(part), None), start, turns)
    is_member = (members.index < T).reshape(-1, length, 1, 1)
    times = scatter(is_member.astype(total.dtype), members.index, T)
    return (total / jnp.maximum(times, 1)).astype(x.dtype)


def gather(x: Float[Array, "B T K H"], index: Int[Array, "B N L M"]) -> Float[Array, "b M 1 H"]:
    """The tokens of all lists, each list a sequence of its own (b = B·N·L); zeros for index T.

    Head n of N reads head n·K/N of K.
    """
    (B, _, K, H), (_, N, L, M) = x.shape, index.shape
    places = index.reshape(B, K, N // K * L * M, 1)
    tokens = jnp.take_along_axis(x.swapaxes(1, 2), places, axis=2, mode="fill", fill_value=0)
    return tokens.reshape(B * N * L, M, 1, H)


def scatter(
    x: Float[Array, "b M 1 H"], index: Int[Array, "B N L M"], length: int
) -> Float[Array, "B T N H"]:
    """Adds up the tokens of all lists at their places in rows of T = `length`; drops index T."""
    B, N, L, M = index.shape

    def add(tokens: Array, places: Array) -> Array:
        return jax.ops.segment_sum(tokens, places, num_segments=length)

    x = x.astype(accumulation_dtype(x.dtype)).reshape(B, N, L * M, x.shape[-1])
    return jax.vmap(jax.vmap(add))(x, index.reshape(B, N, L * M)).swapaxes(1, 2)


def joined(seen: Visibility) -> Visibility:
    """`[B,N,L,M] -> [B·N·L,M]`."""
    return Visibility(*(x.reshape(-1, x.shape[-1]) for x in seen))


def _cut(x: Int[Array, "B N L M"], at_once: int) -> Int[Array, "n B N l M"]:
    return jnp.moveaxis(x.reshape(*x.shape[:2], x.shape[2] // at_once, at_once, x.shape[3]), 2, 0)
