"""What a stream of core context aware attention remembers: recent tokens, and a core a group."""

import dataclasses
import functools
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from lcattn.errors import argument_error
from lcattn.ops import checks
from lcattn.ops.checks import Sizes
from lcattn.ops.core_context_attention.groups import Cores, Views, pool, views
from lcattn.typing import Array, Float, Int


@no_type_check  # JAX also fills it with shapes and specs
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CoreContextState:
    """Of the past, its recent tokens and the cores of its whole groups. No queries are kept.

    Attributes:
      k, v: the last `window + group_size - 2` tokens `[B,R,K,F]` and `[B,R,K,H]`, newest last;
        slots before the stream's start are unused.
      cores: `[B,m,C,F]` and `[B,m,C,H]`, group c in slot c.
      length: number of tokens seen, a scalar int32.
      max_length: the most tokens that a stream may hold.
    """

    k: Float[Array, "B R K F"]
    v: Float[Array, "B R K H"]
    cores: Cores
    length: Int[Array, ""]
    max_length: int = dataclasses.field(metadata={"static": True})


def core_context_attention_state(
    batch_size: int,
    max_length: int,
    num_heads: int,
    num_kv_heads: int,
    key_size: int,
    value_size: int,
    *,
    group_size: int = 16,
    window: int = 1024,
    share_cores: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> CoreContextState:
    """The state before the first token.

    Args:
      batch_size: B.
      max_length: the most tokens that a stream will hold.
      num_heads: N.
      num_kv_heads: K.
      key_size: F.
      value_size: H.
      group_size, window, share_cores: as in `core_context_attention`.
      dtype: that of k and v.
    """
    recent = min(window + group_size - 2, max_length)
    cores = num_kv_heads if share_cores else num_heads
    groups = max_length // group_size
    return CoreContextState(
        k=jnp.zeros((batch_size, recent, num_kv_heads, key_size), dtype),
        v=jnp.zeros((batch_size, recent, num_kv_heads, value_size), dtype),
        cores=Cores(
            jnp.zeros((batch_size, groups, cores, key_size), dtype),
            jnp.zeros((batch_size, groups, cores, value_size), dtype),
        ),
        length=jnp.zeros((), jnp.int32),
        max_length=max_length,
    )


def check_state(
    state: CoreContextState, sizes: Sizes, *, group_size: int, window: int, share_cores: bool
) -> None:
    """Checks a state against a call, and that the new tokens fit into it."""
    checks.check_size("initial_state.max_length", state.max_length)
    empty = functools.partial(
        core_context_attention_state,
        group_size=group_size,
        window=window,
        share_cores=share_cores,
    )
    shape = (sizes.B, state.max_length, sizes.N, sizes.K, sizes.F, sizes.H)
    expected = jax.eval_shape(lambda: empty(*shape))
    for name, array, wanted in (
        ("k", state.k, expected.k),
        ("v", state.v, expected.v),
        ("cores.k", state.cores.k, expected.cores.k),
        ("cores.v", state.cores.v, expected.cores.v),
    ):
        if array.shape != wanted.shape:
            raise argument_error(f"initial_state.{name}", f"shape {wanted.shape}", array.shape)
    checks.check_room(sizes.T, state.max_length, state.length)


def extend(
    state: CoreContextState,
    q: Array,
    k: Array,
    v: Array,
    *,
    group_size: int,
    window: int,
    scale: float,
    share_cores: bool,
) -> tuple[Array, Array, Views, CoreContextState]:
    """Recent and new keys and values, who sees what, and the state after the new tokens.

    A group is pooled as soon as its last token is here, whose query scores it, so that no query
    need be kept until the core is seen.
    """
    T, recent, groups = q.shape[1], state.k.shape[1], state.cores.k.shape[1]
    k = jnp.concatenate([state.k, k.astype(state.k.dtype)], axis=1)
    v = jnp.concatenate([state.v, v.astype(state.v.dtype)], axis=1)
    cores = state.cores
    if groups:
        # The group of the first new token, and as many as new tokens can end. The last of them may
        # be unfinished: nothing sees it, and the call that finishes it writes it again.
        first, inside = state.length // group_size, state.length % group_size
        count = -(-T // group_size)
        start = recent - inside

        def members(x: Array) -> Array:
            x = jnp.pad(x, ((0, 0), (0, group_size), (0, 0), (0, 0)))
            x = lax.dynamic_slice_in_dim(x, start, count * group_size, axis=1)
            return x.reshape(x.shape[0], count, group_size, *x.shape[2:])

        ends = group_size - 1 - inside + group_size * jnp.arange(count)
        queries = jnp.take(q, jnp.minimum(ends, T - 1), axis=1)
        new = pool(queries, members(k), members(v), scale=scale, share_cores=share_cores)
        slots = first + jnp.arange(count)
        cores = Cores(
            *(
                old.at[:, slots].set(x.astype(old.dtype), mode="drop")
                for old, x in zip(cores, new, strict=True)
            )
        )
    seen = views(
        (state.length + jnp.arange(T, dtype=jnp.int32))[None],
        (state.length - recent + jnp.arange(recent + T, dtype=jnp.int32))[None],
        (group_size * jnp.arange(1, groups + 1, dtype=jnp.int32) - 1)[None],
        group_size=group_size,
        window=window,
    )
    after = CoreContextState(k[:, T:], v[:, T:], cores, state.length + T, state.max_length)
    return k.astype(q.dtype), v.astype(q.dtype), seen, after
