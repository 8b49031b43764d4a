"""All levels as one plan of blocks, for the kernels of `block_sparse_attention`.

The queries of the plan are the chunks, level after level; its keys are the sorted blocks and,
behind them, the samples of each group, in the order of the blocks that they are from. A chunk lists
its block, and the samples of its group with the log of how many keys each of them stands for.

A sample from the block that a query reads must not count again. So the position of a query is the
block that it reads, and each sample is hidden from one position. Most blocks of samples come from
other blocks of keys, and need no test.

Each key head is a row of the call, since its blocks are its own; the query heads that share it
share its blocks, and have samples of their own.

On an H200, 131072 tokens of 32 heads of 64 take 4.8 ms without causality, and 11.2 with gradients:
2.0 and 6.7 ms in kernels of attention; of the forward pass, 1.2 ms goes to gathering rows, 0.5 to
sorting ranks, 0.5 to hashing; the rest are indices. Causal ones take 17.6 and 51.8 ms, 12.2 and
41.2 in kernels, of which exact leaves take nearly half. Exact causal attention by cuDNN takes 152
and 571 ms; of 16384 tokens 2.3 and 8.4, where this form takes 1.6 and 5.5.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from lcattn.ops.block_sparse_attention import BlockPlan, block_sparse_part, gpu_kernel
from lcattn.ops.block_sparse_attention.plan import BLOCK
from lcattn.ops.block_sparse_attention.tiles import whole_blocks
from lcattn.ops.block_sparse_attention.visible import default_block
from lcattn.ops.checks import Sizes, accumulation_dtype
from lcattn.ops.hyper_attention.levels import merge_levels
from lcattn.ops.hyper_attention.plan import Options, Plan
from lcattn.ops.hyper_attention.rearranged import rearrange, rearrange_and_sample
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
    """Outputs and log-sum-exps over all levels and what is not estimated, a part of the softmax.

    The arrays of `plan` have axes `[B,K,N/K,...]`.
    """
    (B, _, N, _), K = q.shape, k.shape[2]
    samples, dtype = _Samples.of(plan, options), accumulation_dtype(q.dtype)

    def heads(x: Array) -> Array:
        return lax.collapse(x, 1, 3)

    def lay_out(x: Array) -> Array:
        # Blocks are alike for the query heads of a group.
        keys, sampled = (lax.collapse(x, 2) for x in (plan.keys[:, :, 0], samples.places))
        rows = rearrange_and_sample(x, keys, plan.key_place[:, :, 0], sampled)
        return lax.collapse(rows, 0, 2)[:, :, None]

    place = heads(plan.place)
    readers, queries = (lax.collapse(heads(x), 2) for x in (plan.readers, plan.queries()))
    chunks = rearrange(q, queries, place)
    chunks = jnp.swapaxes(chunks.reshape(B * K, N // K, *chunks.shape[2:]), 1, 2)
    levels = block_sparse_part(
        chunks, lay_out(k), lay_out(v), block_plan(plan, samples, options, dtype),
        scale=options.scale,
    )  # fmt: skip
    out, lse = (jnp.swapaxes(x, 1, 2).reshape(B, N, x.shape[1], *x.shape[3:]) for x in levels)
    return merge_levels((out, lse), exact, place, readers)


class _Samples(NamedTuple):
    """The sampled keys of each group in blocks, e of them a group.

    Attributes:
      places: among the keys of all blocks; past their end where a block is filled up.
      begin, end: the position from which they are seen and that up to which they are, around the
        circle: of a sample from block j, j + 1 and j. What fills a block up is never seen.
    """

    places: Int[Array, "B K G P e s"]
    begin: Int[Array, "B K G P e s"]
    end: Int[Array, "B K G P e s"]

    @classmethod
    def of(cls, plan: Plan, options: Options) -> "_Samples":
        places = jnp.sort(plan.samples, axis=-1)
        block, size = places // options.block_size, key_block(options)
        return cls(
            whole_blocks(places, size, constant_values=math.prod(plan.keys.shape[-2:])),
            whole_blocks(block + 1, size, constant_values=NEVER),
            whole_blocks(block, size, constant_values=NEVER),
        )


def pays(*, sizes: Sizes, dtype: jnp.dtype, query_block: int, key_block: int) -> bool:
    """Whether to take this form unasked: where kernels for Hopper GPUs run its plan.

    They took a sixth of the time of chunks in plain JAX; no other kernels have been measured.
    """
    return sizes.T >= _PAYS_FROM and gpu_kernel.runs_blocks(
        sizes=sizes, dtype=dtype, query_block=query_block, key_block=key_block
    )


def key_block(options: Options) -> int:
    """Keys of a block of the plan: those of a block of alike keys, or a part that suits kernels."""
    b = options.block_size
    return math.gcd(b, default_block()) if b % BLOCK == 0 else b


def block_plan(plan: Plan, samples: _Samples, options: Options, dtype: jnp.dtype) -> BlockPlan:
    """What every chunk reads, with log-weights of `dtype`; rows are those of the batch times K."""
    B, K, G, n, b = plan.keys.shape
    c = plan.readers.shape[-1]
    S, size = plan.key_place.shape[-1], key_block(options)
    P, e = samples.places.shape[-3:-1]
    own = b // size  # blocks of the plan to a block of alike keys

    def of_chunk(x: Array, index: Array) -> Array:
        return jnp.take_along_axis(x, index, axis=3)[..., None]

    position = plan.block[..., None]
    has_keys = plan.keys.reshape(B, K, G, n, own, size)[..., 0] < S
    num_own = of_chunk(jnp.sum(has_keys, axis=-1, dtype=jnp.int32), plan.block)
    nth = jnp.arange(own + e, dtype=jnp.int32)
    member = jnp.arange(G, dtype=jnp.int32)[:, None, None]
    sampled = n * own + (member * P + plan.group[..., None]) * e + nth - num_own
    is_own = nth < num_own
    times = of_chunk(plan.num_keys, plan.group).astype(dtype) / options.sample_size
    is_used = plan.readers[..., 0] < plan.place.shape[-2] * plan.place.shape[-1]

    def rows(x: Array) -> Array:
        return x.reshape(B * K, G, *x.shape[3:])

    def edges(x: Array) -> Array:
        return lax.collapse(lax.collapse(x, 2), 0, 2)[:, None]

    key_exists = edges(plan.keys[:, :, 0]) < S
    begin, end = edges(samples.begin), edges(samples.end)
    seen = Visibility(
        jnp.repeat(rows(jnp.where(is_used, plan.block, HIDDEN)), c, axis=-1),
        jnp.concatenate([jnp.zeros_like(key_exists, jnp.int32), begin], axis=-1),
        jnp.concatenate([jnp.where(key_exists, NEVER, 0), end], axis=-1),
    )
    return BlockPlan(
        blocks=rows(jnp.where(is_own, position * own + nth, sampled)),
        count=rows(jnp.where(is_used, num_own[..., 0] + e, 0)),
        seen=seen,
        log_weight=rows(jnp.where(is_own, 0, jnp.log(times))),
        query_block=c,
        key_block=size,
    )
