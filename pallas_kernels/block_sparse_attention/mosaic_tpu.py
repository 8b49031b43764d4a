r"""Softmax attention over lists of blocks of keys for TPUs, in Pallas Mosaic TPU.

    O_i = sum_j exp(x_ij - l_i) v_j,    l_i = log sum_j exp(x_ij),    x_ij = scale q_i·k_j + w

over the keys j of the blocks that are listed for i's block, as far as the rule lets i see them. One
walk over the lists forward, and two back: by queries for d q, by keys for d k and d v. Operands of
products have the dtype of q, all else is float32. Scores exist in VMEM only.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.config import TpuLaunchConfig, tpu_heuristic
from pallas_kernels.block_sparse_attention.items import (
    MOST_BLOCKS,
    NEVER,
    Lists,
    by_keys,
    by_queries,
    spans,
)
from pallas_kernels.block_sparse_attention.tpu_walks import (
    LN2,
    Plan,
    Rule,
    attend,
    key_gradients,
    query_gradients,
)
from pallas_kernels.tpu import DTYPES, LANES, SUBLANES, feature_major, token_major

MOST_ITEMS = 200_000
"""Items and log-weights of a call, of four bytes each: most of the megabyte of scalar memory."""


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
    config: TpuLaunchConfig | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention over lists of blocks; differentiable in q, k and v.

    Args:
      q: queries `[B,T,N,F]`, bfloat16 or float32. F is a multiple of 8.
      k: keys `[B,S,K,F]`; K divides N.
      v: values `[B,S,K,H]`; H is a multiple of 8.
      lists: which blocks are read; b is B or 1, h is P or divides it, where P is K, or N if any
        list or rule has N heads.
      rule: positions of queries `[b,h,T]`, begins and ends of keys `[b,h,S]` in int32: a query at
        position p reads a key only if `begin <= p < end`; of a key that ends before it begins,
        unless `end <= p < begin`.
      query_block, key_block: sizes of blocks, multiples of 128.
      scale: factor of scores.
      is_part: whether gradients of the log-sum-exp come less the output's along itself, from a
        softmax that the call is a part of.
      config: launch parameters; default: by shape.
      interpret: whether to run in the TPU simulator.

    Returns:
      The output `[B,T,N,H]` in the dtype of q, and the log-sum-exp `[B,T,N]` in float32.

    Raises:
      ValueError: saying why these kernels do not serve the call.
    """
    (_, T, N, F), (S, K, H) = q.shape, v.shape[1:]
    differ = any(x.shape[1] == N for x in (lists.blocks, *rule))
    P = N if differ else K
    members, m, n = N // P, -(-T // query_block), -(-S // key_block)
    reason = objection(
        dtype=q.dtype, F=F, H=H, query_block=query_block, key_block=key_block, members=members,
        blocks=max(m, n), items=lists.blocks.size + lists.start.size,
        weighted=lists.log_weight is not None,
    )  # fmt: skip
    if reason is not None:
        raise ValueError(f"block_sparse_attention: the mosaic_tpu kernels {reason}")
    config = config or tpu_heuristic(H=H, key_block=key_block)
    plan = Plan(
        scale=scale, rows=members * query_block, keys=key_block, strip=config.strip,
        is_part=is_part, interpret=interpret,
    )  # fmt: skip

    def rows(x):
        """`[B,N,size,T] -> [B,P,size,m * r]`: heads that share a list are rows of one block."""
        x = x.reshape(len(x), P, members, -1, m, query_block)
        return x.transpose(0, 1, 3, 4, 2, 5).reshape(len(x), P, x.shape[3], -1)

    def unrows(x):
        x = x.reshape(len(x), P, -1, m, members, query_block).transpose(0, 1, 4, 2, 3, 5)
        return x.reshape(len(x), N, x.shape[3], -1)

    positions, *edges = rule
    # Queries that fill the last block are like its last one, so that they do not make it partial.
    positions = jnp.pad(positions, ((0, 0), (0, 0), (0, m * query_block - T)), mode="edge")
    positions = positions.reshape(*positions.shape[:2], m, 1, query_block)
    positions = jnp.tile(positions, (1, 1, 1, members, 1))
    fill = ((0, 0), (0, 0), (0, n * key_block - S))
    edges = (jnp.pad(x, fill, constant_values=NEVER) for x in edges)
    padded = Rule(
        positions.reshape(*positions.shape[:2], 1, -1),
        jnp.stack(spans(*edges), axis=2),
    )
    out, lse = _attend(
        plan, rows(feature_major(q, m * query_block)),
        *(feature_major(x, n * key_block) for x in (k, v)),
        lists, (padded.positions, padded.edges),
    )  # fmt: skip
    return token_major(unrows(out), T), token_major(unrows(lse), T)[..., 0]


def objection(
    *,
    dtype,
    F: int,
    H: int,
    query_block: int,
    key_block: int,
    members: int,
    blocks: int,
    items: int,
    weighted: bool,
) -> str | None:
    """Why the kernels do not serve a call, in words, or None."""
    if dtype not in DTYPES:
        return f"take bfloat16 or float32, not {jnp.dtype(dtype).name}"
    for name, size in (("F", F), ("H", H)):
        if size % SUBLANES or size > 256:
            return f"take heads of a size 8, 16, ... 256, not {name}={size}"
    for name, size in (("query_block", query_block), ("key_block", key_block)):
        if size % LANES or not size or size > 512:
            return f"take blocks of 128, 256 or 512, not {name}={size}"
    if members * query_block > 2048:
        return f"take up to 2048 queries a block, not {members} heads of {query_block}"
    if blocks > MOST_BLOCKS:
        return f"take up to {MOST_BLOCKS} blocks of queries or keys, not {blocks}"
    if items * (1 + weighted) > MOST_ITEMS:
        return f"take lists of up to {MOST_ITEMS // (1 + weighted)} blocks in all, not {items}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q, k, v, lists: Lists, rule):
    return _attend_forward(plan, q, k, v, lists, rule)[0]


def _attend_forward(plan, q, k, v, lists, rule):
    out, lse = attend(plan, q, k, v, by_queries(lists), Rule(*rule))
    return (out, lse), (q, k, v, lists, rule, out, lse)


def _attend_backward(plan, residuals, cotangents):
    q, k, v, lists, rule, out, lse = residuals
    d_out, d_lse = cotangents
    empty = jnp.isneginf(lse)
    # d x_ij = p_ij (d_out_i · v_j - d_out_i · out_i + d_lse_i)
    mean = -jnp.where(empty, 0, d_lse)
    if not plan.is_part:
        mean += jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=2, keepdims=True)
    numbers = jnp.concatenate([jnp.where(empty, 0, lse) / LN2, mean], axis=2)
    streams = q, d_out, numbers, k, v
    dq = query_gradients(plan, *streams, by_queries(lists), Rule(*rule))
    sums = key_gradients(plan, *streams, by_keys(lists), Rule(*rule))
    # Heads of lists that share a head of keys.
    dk, dv = (
        d.reshape(*x.shape[:2], -1, *x.shape[2:]).sum(axis=2).astype(x.dtype)
        for d, x in zip(sums, (k, v), strict=True)
    )
    return dq, dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)
