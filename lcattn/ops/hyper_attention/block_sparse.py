"""All levels as one plan of blocks, for the kernels of `block_sparse_attention`.

The queries of the plan are the chunks, level after level; its keys are the sorted blocks and,
behind them, the samples. A chunk lists its block, and the samples of its group with the log of how
many keys each of them stands for.

A sample from the block that a query reads must not count again. So samples are in the order of the
blocks that they are from, and lie there twice: for queries of earlier blocks, and of later ones::

    samples from block   0 0 1 2   0 0 1 2
    query of block 0     . . x x   . . . .
    query of block 1     . . . x   x x . .
    query of block 2     . . . .   x x x .

Query heads that share a key head share its blocks, and have samples of their own.

On an H200, 131072 causal tokens of 32 heads of 64 take 23.3 ms forward: 14.2 in kernels, of which
exact leaves take nearly half, as the time for 16384 tokens tells; 3.5 to gather queries, keys and
values in order, 1.1 to sort ranks, 0.9 to hash, 0.7 to merge; the rest are indices. Gradients add
43.1 ms, of which kernels take 34.9. Exact attention by cuDNN takes 153 ms, and 597 with gradients;
at 16384 tokens it is still slower, by 1.2 and 1.4 times.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp

from lcattn.ops.block_sparse_attention import BlockPlan, block_sparse_attention, kernel
from lcattn.ops.block_sparse_attention.plan import BLOCK
from lcattn.ops.block_sparse_attention.tiles import whole_blocks
from lcattn.ops.block_sparse_attention.visible import default_block
from lcattn.ops.checks import Sizes, accumulation_dtype
from lcattn.ops.hyper_attention.levels import merge_levels
from lcattn.ops.hyper_attention.plan import Options, Plan
from lcattn.ops.hyper_attention.rearranged import rearrange, take
from lcattn.ops.visibility import HIDDEN, NEVER, Visibility
from lcattn.typing import Array, Float, Int

# The shortest length that was timed: benchmarks/h200.
_PAYS_FROM = 16_384


def attend(
    q: Float[Array, "B T N F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K H"],
    plan: Plan,
    options: Options,
    exact: tuple[Float[Array, "B T N H"], Float[Array, "B T N"]] | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Outputs and log-sum-exps over all levels and what is not estimated.

    The arrays of `plan` have axes `[B,K,N/K,...]`.
    """
    (B, T, N, _), K, L = q.shape, k.shape[2], plan.place.shape[-2]
    samples, dtype = _Samples.of(plan, options), accumulation_dtype(q.dtype)

    def heads(x: Array, *shape: int) -> Array:
        return x.reshape(B, N, *shape)

    def key_heads(x: Array) -> Array:
        """Blocks, which are alike for the query heads of a group."""
        return x[:, :, 0].reshape(B, K, -1)

    def lay_out(x: Array) -> Array:
        blocks = rearrange(x, key_heads(plan.keys), plan.key_place[:, :, 0])
        # A key may be sampled often: its gradients are summed in `dtype`.
        sampled = take(x.astype(dtype), samples.tokens.reshape(B, K, -1))
        return jnp.concatenate([blocks, sampled.astype(x.dtype)], axis=1)

    place, readers = heads(plan.place, L, T), heads(plan.readers, -1)
    levels = block_sparse_attention(
        rearrange(q, heads(plan.queries(), -1), place), lay_out(k), lay_out(v),
        block_plan(plan, samples, options, dtype), scale=options.scale, return_lse=True,
    )  # fmt: skip
    return merge_levels(levels, exact, place, readers)


class _Samples(NamedTuple):
    """The sampled keys of each group in blocks, e of them a group.

    Attributes:
      tokens: that were drawn; S where a block is filled up. Copy 0 is for earlier blocks of keys,
        copy 1 for later ones.
      begin, end: the first block whose readers see them, and the one after the last.
      first, last: the first and last block of keys that those of a block are from.
    """

    tokens: Int[Array, "B K G 2 P e s"]
    begin: Int[Array, "B K G 2 P e s"]
    end: Int[Array, "B K G 2 P e s"]
    first: Int[Array, "B K G P e"]
    last: Int[Array, "B K G P e"]

    @classmethod
    def of(cls, plan: Plan, options: Options) -> "_Samples":
        keys = plan.keys.reshape(*plan.keys.shape[:3], 1, -1)
        places = jnp.sort(plan.samples, axis=-1)
        tokens = jnp.take_along_axis(keys, places, axis=-1)
        block = places // options.block_size
        size = key_block(options)
        tokens = whole_blocks(tokens, size, constant_values=plan.key_place.shape[-1])
        first = whole_blocks(block, size)[..., 0]
        last = whole_blocks(block, size, constant_values=-1).max(axis=-1)
        # What fills a block up begins where it ends.
        begin = whole_blocks(block + 1, size, constant_values=NEVER)
        end = whole_blocks(block, size)
        return cls(
            jnp.stack([tokens, tokens], axis=3),
            jnp.stack([jnp.zeros_like(begin), begin], axis=3),
            jnp.stack([end, jnp.full_like(end, NEVER)], axis=3),
            first,
            last,
        )


def pays(*, sizes: Sizes, dtype: jnp.dtype, query_block: int, key_block: int) -> bool:
    """Whether to take this form unasked: where kernels for Hopper GPUs run its plan.

    They took a fifth of the time of chunks in plain JAX; no other kernels have been measured.
    """
    objection = kernel.objection_to_blocks(
        sizes=sizes, dtype=dtype, query_block=query_block, key_block=key_block
    )
    return sizes.T >= _PAYS_FROM and objection is None and kernel.pays()


def key_block(options: Options) -> int:
    """Keys of a block of the plan: those of a block of alike keys, or a part that suits kernels."""
    b = options.block_size
    return math.gcd(b, default_block()) if b % BLOCK == 0 else b


def block_plan(plan: Plan, samples: _Samples, options: Options, dtype: jnp.dtype) -> BlockPlan:
    """What every chunk reads, with log-weights of `dtype`."""
    B, K, G, n, b = plan.keys.shape
    c = plan.readers.shape[-1]
    S, size = plan.key_place.shape[-1], key_block(options)
    P, e = samples.first.shape[-2:]
    own = b // size  # blocks of the plan to a block of alike keys

    def of_chunk(x: Array, index: Array) -> Array:
        return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 4)), axis=3)

    position = plan.block[..., None]
    has_keys = plan.keys.reshape(B, K, G, n, own, size)[..., 0] < S
    num_own = of_chunk(jnp.sum(has_keys, axis=-1, dtype=jnp.int32), plan.block)[..., None]
    # Of the first copy the last blocks are read, of the second the first ones. At most one block
    # of samples is read from both, since those of the query's own block are in one stretch.
    unread, read = (
        jnp.sum(of_chunk(x, plan.group) < edge, axis=-1, dtype=jnp.int32, keepdims=True)
        for x, edge in ((samples.last, position + 1), (samples.first, position))
    )
    nth = jnp.arange(own + e + 1, dtype=jnp.int32)
    nth_sampled = nth - num_own
    member = jnp.arange(G, dtype=jnp.int32)[:, None, None]
    copy = n * own + (2 * member * P + plan.group[..., None]) * e
    sampled = nth_sampled + unread + jnp.where(nth_sampled < e - unread, copy, copy + (P - 1) * e)
    is_own = nth_sampled < 0
    count = (num_own + e - unread + read)[..., 0]
    times = of_chunk(plan.num_keys, plan.group).astype(dtype) / options.sample_size
    log_weight = jnp.where(is_own, 0, jnp.log(times)[..., None])
    is_used = plan.readers[..., 0] < plan.place.shape[-2] * plan.place.shape[-1]

    def heads(x: Array) -> Array:
        return x.reshape(B, K * G, *x.shape[3:])

    key_exists = plan.keys[:, :, 0].reshape(B, K, -1) < S
    begin, end = (x.reshape(B, K, -1) for x in (samples.begin, samples.end))
    seen = Visibility(
        jnp.repeat(heads(jnp.where(is_used, plan.block, HIDDEN)), c, axis=-1),
        jnp.concatenate([jnp.zeros_like(key_exists, jnp.int32), begin], axis=-1),
        jnp.concatenate([jnp.where(key_exists, NEVER, 0), end], axis=-1),
    )
    return BlockPlan(
        blocks=heads(jnp.where(is_own, position * own + nth, sampled)),
        count=heads(jnp.where(is_used, count, 0)),
        seen=seen,
        log_weight=heads(log_weight),
        query_block=c,
        key_block=size,
    )
