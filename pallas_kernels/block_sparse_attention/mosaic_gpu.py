r"""Softmax attention over lists of blocks of keys for Hopper GPUs, in Pallas Mosaic GPU.

    O_i = sum_j exp(x_ij - l_i) v_j,    l_i = log sum_j exp(x_ij),    x_ij = scale q_i·k_j + w

over the keys j of the blocks that are listed for i's block, as far as the rule lets i see them. One
walk over the lists forward, and two back: by queries for d q, by keys for d k and d v. Scores exist
in registers only, and two numbers a query in memory: O(T) besides the lists. Operands of products
have the dtype of q, all else is float32.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.backward import key_gradients, query_gradients
from pallas_kernels.block_sparse_attention.config import LaunchConfig, Walks, heuristic
from pallas_kernels.block_sparse_attention.forward import attend
from pallas_kernels.block_sparse_attention.items import NEVER, Lists, spans
from pallas_kernels.block_sparse_attention.phases import by_keys, by_queries
from pallas_kernels.block_sparse_attention.plan import LOG2_E, Plan, Rule
from pallas_kernels.inner import inner
from pallas_kernels.tiles import TILE


def block_sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lists: Lists,
    rule: tuple[jax.Array, jax.Array, jax.Array],
    *,
    query_block: int,
    key_block: int,
    scale: float,
    is_part: bool = False,
    config: LaunchConfig | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention over lists of blocks; differentiable in q, k and v.

    Args:
      q: queries `[B,T,N,H]`, bfloat16 or float16. H is 64 or 128.
      k: keys `[B,S,K,H]`; K divides N.
      v: values `[B,S,K,H]`.
      lists: which blocks are read; b is B or 1, and h divides N.
      rule: positions of queries `[b,h,T]`, begins and ends of keys `[b,h,S]` in int32: a query at
        position p reads a key only if `begin <= p < end`; of a key that ends before it begins,
        unless `end <= p < begin`.
      query_block, key_block: sizes of blocks, multiples of 64. A multiple of 128 is shared by two
        warpgroups.
      scale: factor of scores.
      is_part: whether gradients of the log-sum-exp come less the output's along itself, from a
        softmax that the call is a part of.
      config: launch parameters; default: by sizes of blocks.
      interpret: whether to run in the CPU simulator. It takes a thread of XLA for each of three
        warpgroups and waits for ever where there are fewer: with two cores, say
        `XLA_FLAGS=--xla_force_host_platform_device_count=8`.

    Returns:
      The output `[B,T,N,H]` in the dtype of q, and the log-sum-exp `[B,T,N]` in float32.

    Raises:
      ValueError: saying why these kernels do not serve the call.
    """
    (T, N), (S, _, H) = q.shape[1:3], v.shape[1:]
    config = config or _heuristic(q, k, lists, query_block, key_block)
    reason = objection(
        dtype=q.dtype, B=len(q), N=N, F=q.shape[3], H=H, query_block=query_block,
        key_block=key_block,
    )  # fmt: skip
    if reason is not None:
        raise ValueError(f"block_sparse_attention: the mosaic_gpu kernels {reason}")
    for name, block in (
        ("width", key_block), ("query_gradient_width", key_block),
        ("key_gradient_width", query_block),
    ):  # fmt: skip
        if block % getattr(config, name):
            raise ValueError(
                f"block_sparse_attention: expected config.{name} to divide blocks of {block}, "
                f"got {getattr(config, name)}"
            )
    if scale <= 0:  # in the kernels the largest product gives the largest score
        q, scale = q * math.copysign(scale != 0, scale), -scale or 1.0
    plan = Plan(
        scale=scale, heads=N, query_block=query_block, key_block=key_block, config=config,
        is_part=is_part, interpret=interpret,
    )  # fmt: skip
    queries, keys = -T % query_block, -S % key_block
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, n), (0, 0), (0, 0)))
        for x, n in ((q, queries), (k, keys), (v, keys))
    )
    positions, *edges = rule
    edges = (jnp.pad(x, ((0, 0), (0, 0), (0, keys)), constant_values=NEVER) for x in edges)
    padded = Rule(
        # Queries that fill the last block are like its last one; keys that do are never seen.
        jnp.pad(positions, ((0, 0), (0, 0), (0, queries)), mode="edge"),
        *spans(*edges),
    )
    out, lse = _attend(plan, q, k, v, lists, padded)
    return out[:, :T], lse.swapaxes(1, 2)[:, :T]


def _heuristic(
    q: jax.Array, k: jax.Array, lists: Lists, query_block: int, key_block: int
) -> LaunchConfig:
    (B, _, N, _), K = q.shape, k.shape[2]
    m, e = lists.blocks.shape[2:]
    n = lists.start.shape[-1] - 1
    readers, keys = Walks(B * N * m, e), Walks(B * K * n, N // K * m * e / n)
    return heuristic(
        H=q.shape[3], query_block=query_block, key_block=key_block, readers=readers, keys=keys
    )


def objection(
    *, dtype, B: int, N: int, F: int, H: int, query_block: int, key_block: int
) -> str | None:
    """Why the kernels do not serve a call, in words, or None."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"take bfloat16 or float16, not {jnp.dtype(dtype).name}"
    if F != H or H not in (64, 128):
        return f"take keys and values of one size, 64 or 128, not F={F}, H={H}"
    for name, size in (("query_block", query_block), ("key_block", key_block)):
        if size % TILE:
            return f"take blocks of multiples of 64, not {name}={size}"
    if max(B, N) >= 2**16:
        return f"take up to 65535 rows and heads, not B={B}, N={N}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q, k, v, lists: Lists, rule: Rule):
    return _attend_forward(plan, q, k, v, lists, rule)[0]


def _attend_forward(plan, q, k, v, lists, rule):
    out, lse = attend(plan, q, k, v, by_queries(lists), rule)
    return (out, lse), (q, k, v, lists, rule, out, lse)


def _attend_backward(plan, residuals, cotangents):
    q, k, v, lists, rule, out, lse = residuals
    g, d_lse = cotangents
    empty = jnp.isneginf(lse)
    mean = -jnp.where(empty, 0, d_lse)
    if not plan.is_part:
        mean += inner(g, out).swapaxes(1, 2)
    numbers = jnp.stack([jnp.where(empty, jnp.inf, lse * LOG2_E), mean], axis=2)
    arrays = q, g, numbers, k, v
    dq = query_gradients(plan, *arrays, by_queries(lists), rule)
    dk, dv = key_gradients(plan, *arrays, by_keys(lists), rule)
    return dq, dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)
