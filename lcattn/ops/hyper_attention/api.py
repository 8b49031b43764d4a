"""The public op: arguments, checks, and what each implementation does with groups and draws."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lcattn.errors import argument_error
from lcattn.ops import blocks, checks, dispatch, sharding
from lcattn.ops.block_sparse_attention import visible
from lcattn.ops.hyper_attention import block_sparse, blockwise, dense
from lcattn.ops.hyper_attention.draws import Draws, draw
from lcattn.ops.hyper_attention.groups import Bounds, Groups, causal_groups, document_groups
from lcattn.ops.hyper_attention.hashing import most_projections, ranks
from lcattn.ops.hyper_attention.plan import Options, Plan, make_plan
from lcattn.ops.merging import merge
from lcattn.ops.softmax_attention import chunked, softmax_attention
from lcattn.ops.visibility import visibility
from lcattn.typing import Array, Float, Key, PRNGKeyArray, SegmentIds


@sharding.partitioned
def hyper_attention(
    q: Float[Array, "B T N F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K H"],
    planes: Float[Array, "F r"] | None = None,
    *,
    causal: bool = True,
    segment_ids: SegmentIds | None = None,
    scale: float | None = None,
    rng: PRNGKeyArray | Key[Array, "B N"] | None = None,
    num_projections: int = 7,
    block_size: int = 256,
    sample_size: int = 256,
    min_seq_len: int = 4096,
    strict: bool = True,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    r"""Softmax attention estimated from alike keys and a sample of the others (HyperAttention).

    Layout `[B,T,N,H]`; hash, scores and sums in float32, output in the dtype of `q`.

    Keys are sorted so that alike ones come together (sortLSH): r random hyperplanes cut space into
    2^r buckets, and buckets are walked in Gray order, one plane at a time. The sorted keys are cut
    into blocks of b = `block_size`. A query i counts the keys of one block, where its own bucket
    is, exactly; of all S keys it counts a uniform sample of m = `sample_size`, drawn with
    replacement, in place of the rest:

    .. math::
        \hat Z_i = \sum_{j \in \mathrm{block}(i)} e^{s_{ij}}
                 + \frac{S}{m} \sum_{t=1}^{m} [j_t \notin \mathrm{block}(i)]\, e^{s_{i j_t}},
        \qquad s_{ij} = \mathrm{scale} \cdot q_i^\top k_j

    and the numerator likewise, with values. Both sums have the right mean over the draws (their
    ratio, nearly), and errors fall as m^(-1/2). All queries of a head and group share one sample.

    With causality, a sequence is halved again and again: the second half reads the first so, and
    each half attends within itself, down to leaves of s = `min_seq_len` tokens, which are exact.
    All levels are one batch of blocks here, and cuts lie at multiples of s: see `groups.py`.

    Time O(T (b + m) log(T/s) + T s) when causal, O(T (b + m)) otherwise, beside sorting; memory
    O(T). Without parameters of its own: a trained softmax layer can be converted.

    Source: Han et al. 2023, "HyperAttention: Long-context Attention in Near-Linear Time" (arXiv
    2310.05869), as in the authors' code: neither row norms of V nor a capped denominator. What
    differs from that code, and why:

    - It matches the i-th of all sorted queries to the i-th sorted key. A later token then moves
      earlier queries to other blocks: no value leaks, but outputs do change. With `strict` a query
      looks up its block by its own bucket. `strict=False` is the published form, not causal.
    - It applies the Gray map forward, where its inverse gives the order.
    - Its 16-bit path drops the gradient through the weights that merge the parts, and the gradient
      of the log-sum-exp. Here gradients are those of the estimate.
    - Its float32 and CUDA paths count a sampled key of the query's own block twice, and keys that
      fill up the last block as if they were there, with score 0.
    - Its merge caps the sampled part at 1/epsilon of the block's. Here it is a `logaddexp`.
    - It halves each length evenly; here halves are cut where a longer sequence would be cut, so
      that a prefix gives the same output. For T = s·2^n the two agree.
    - It hashes without causality from T = s on, whatever the number of keys; here a document is
      exact up to s keys, with causality or without.

    Args:
      q: queries `[B,T,N,F]`. T = S when causal.
      k: keys `[B,S,K,F]`; K divides N.
      v: values `[B,S,K,H]`.
      planes: normals of the hyperplanes `[F,r]`, say one draw a layer for good. Default: drawn
        from `rng`, standard normal, for all rows and heads.
      causal: query t counts no key after it.
      segment_ids: document of each token `[B,T]`, for packed rows.
      scale: factor of the scores; default `F ** -0.5`.
      rng: a JAX key; needed where a row is longer than `min_seq_len`. Or a key for each row and
        query head `[B,N]`, with `planes`: under `shard_map`, say, where each shard counts its rows
        and heads anew.
      num_projections: r of the planes that are drawn; 7 as published, and at most 7 or, if that is
        more, log2 of `min_seq_len`.
      block_size: b, at most `min_seq_len`; 256 as published.
      sample_size: m; 256 as published.
      min_seq_len: s, the most tokens that are exact; 4096 as published.
      strict: a query's block depends on that query and the keys alone. Costs up to half again as
        many scores, since blocks are then read by uneven numbers of queries.
      return_lse: also return the log of each estimated softmax denominator, `[B,T,N]` float32,
        -inf where no key is seen.
      implementation: "block_sparse" (all levels as one plan of blocks, in the best form of
        `block_sparse_attention`; unasked for long rows where kernels for Hopper GPUs run it),
        "xla" (blocks), "reference" (the definition, T·S memory), or None.

    Returns:
      `[B,T,N,H]`, or that and the log-sum-exp.

    Raises:
      ValueError: for arguments that do not fit, or where an `rng` is needed and missing.
    """
    sizes = checks.check_heads(q, k, v, segment_ids)
    scale = checks.resolve_scale(scale, sizes.F)
    for name, value in (
        ("block_size", block_size), ("sample_size", sample_size), ("min_seq_len", min_seq_len),
    ):  # fmt: skip
        checks.check_size(name, value)
    if block_size > min_seq_len:
        raise argument_error("block_size", f"at most min_seq_len={min_seq_len}", block_size)
    if causal and sizes.T != sizes.S:
        raise argument_error("q", f"T={sizes.S} queries, as many as keys, when causal", sizes.T)
    options = Options(scale, block_size, sample_size, strict)
    run = dispatch.choose(
        "hyper_attention", implementation, sizes=sizes, dtype=q.dtype,
        query_block=options.chunk, key_block=block_sparse.key_block(options),
    )  # fmt: skip
    if min_seq_len >= sizes.S:
        return softmax_attention(
            q, k, v, causal=causal, segment_ids=segment_ids, scale=scale, return_lse=return_lse,
            implementation=implementation,
        )  # fmt: skip

    drawn = draw(rng, planes, sizes=sizes, num_projections=num_projections)
    most, r = most_projections(min_seq_len), drawn.planes.shape[1]
    if r > most:
        expected = f"at most {most}, by min_seq_len={min_seq_len}"
        raise argument_error("num_projections", expected, r)
    cuts = {"min_seq_len": min_seq_len, "block_size": block_size}
    if causal:
        groups, bounds = causal_groups(sizes.S, segment_ids, **cuts)
    else:
        groups, bounds = document_groups(sizes.T, sizes.S, segment_ids, **cuts)
    leaf = min_seq_len if causal and segment_ids is None else None
    out, lse = run(q, k, v, drawn, groups, bounds, leaf, options)
    return (out.astype(q.dtype), lse) if return_lse else out.astype(q.dtype)


def _in_chunks(
    q: Array, k: Array, v: Array, drawn: Draws, groups: Groups, bounds: Bounds, leaf: int | None,
    options: Options,
) -> tuple[Array, Array]:  # fmt: skip
    def head(q, k, v, *rest):
        return blockwise.attend(q, k, v, _plan(q, k, drawn, bounds, options, *rest), options)

    outs, lses = _over_heads(head, q, k, v, drawn, groups[:3])
    parts = [(outs[:, level], lses[:, level]) for level in range(outs.shape[1])]
    exact = functools.partial(chunked.attend, scale=options.scale)
    exact = _exact(q, k, v, groups, leaf, exact)
    return merge(*parts) if exact is None else merge(*parts, exact)


def _block_sparse(
    q: Array, k: Array, v: Array, drawn: Draws, groups: Groups, bounds: Bounds, leaf: int | None,
    options: Options,
) -> tuple[Array, Array]:  # fmt: skip
    def head(q, k, v, *rest):
        del v
        return _plan(q, k, drawn, bounds, options, *rest)

    plan = _map_heads(head, q, k, v, drawn, groups[:3])
    exact = functools.partial(
        visible.attend, scale=options.scale, window=bounds.num_exact, is_part=True
    )
    return block_sparse.attend(q, k, v, plan, options, _exact(q, k, v, groups, leaf, exact))


def _plan(
    q: Array, k: Array, drawn: Draws, bounds: Bounds, options: Options, key, queries, keys, draw_ids
) -> Plan:
    """What one head reads."""
    return make_plan(
        ranks(q, drawn.planes), ranks(k, drawn.planes), key, queries, keys, draw_ids,
        num_projections=drawn.planes.shape[1], bounds=bounds, options=options,
    )  # fmt: skip


def _exact(
    q: Array, k: Array, v: Array, groups: Groups, leaf: int | None,
    attend: Callable[..., tuple[Array, Array]],
) -> tuple[Array, Array] | None:  # fmt: skip
    """What is not estimated, by `attend`, if there is anything."""
    if leaf is not None:
        return _leaves(q, k, v, leaf, attend)
    return None if groups.exact is None else attend(q, k, v, groups.exact)


def _leaves(
    q: Array, k: Array, v: Array, size: int, exact: Callable[..., tuple[Array, Array]]
) -> tuple[Array, Array]:
    """Causal attention within each `size` tokens, leaves side by side in the batch."""
    B, length = q.shape[:2]
    count = -(-length // size)

    def fold(x: Array) -> Array:
        x = blocks.pad(x, size, 1)
        return x.reshape(B * count, size, *x.shape[2:])

    parts = exact(fold(q), fold(k), fold(v), visibility(size, size, causal=True))
    out, lse = (x.reshape(B, count * size, *x.shape[2:])[:, :length] for x in parts)
    return out, lse


def _reference(
    q: Array, k: Array, v: Array, drawn: Draws, groups: Groups, bounds: Bounds, leaf: int | None,
    options: Options,
) -> tuple[Array, Array]:  # fmt: skip
    del bounds, leaf
    exact = jnp.zeros((len(groups.keys), 1, 1), bool)
    if groups.exact is not None:
        exact = groups.exact.mask()

    def head(q, k, v, key, queries, keys, draw_ids, exact):
        q_ranks, k_ranks = ranks(q, drawn.planes), ranks(k, drawn.planes)
        times = exact.astype(checks.accumulation_dtype(q.dtype))
        for level in range(len(keys)):
            times += dense.estimated_times(
                q_ranks, k_ranks, key, queries[level], keys[level], draw_ids, options
            )
        return dense.attend(q, k, v, times, scale=options.scale)

    return _over_heads(head, q, k, v, drawn, (*groups[:3], exact))


def _over_heads(
    head: Callable[..., tuple[Array, Array]],
    q: Array,
    k: Array,
    v: Array,
    drawn: Draws,
    row: tuple[Array, ...],
) -> tuple[Array, Array]:
    """`_map_heads`, with results `[..., T, (H)]` as `[B, ..., T, N, (H)]`."""
    out, lse = _map_heads(head, q, k, v, drawn, row)
    out, lse = (x.reshape(q.shape[0], q.shape[2], *x.shape[3:]) for x in (out, lse))
    return jnp.moveaxis(out, 1, -2), jnp.moveaxis(lse, 1, -1)


def _map_heads[Result](
    head: Callable[..., Result],
    q: Array,
    k: Array,
    v: Array,
    drawn: Draws,
    row: tuple[Array, ...],
) -> Result:
    """Maps `head(q, k, v, key, *row)` of one head over rows and heads, `[B,K,N/K,...]`.

    Arrays of a row are the same for all heads; what a key head needs is computed once for all its
    query heads.
    """
    (B, _, N, _), K = q.shape, k.shape[2]
    shared = tuple(x[0] if len(x) == 1 else x for x in row)
    axes = tuple(None if len(x) == 1 else 0 for x in row)
    same = (None,) * len(row)
    group = jax.vmap(head, (1, None, None, 0, *same))
    heads = jax.vmap(group, (1, 1, 1, 0, *same))
    rows = jax.vmap(heads, (0, 0, 0, 0, *axes))
    q = q.reshape(*q.shape[:2], K, N // K, q.shape[3])
    return rows(q, k, v, drawn.keys.reshape(B, K, N // K), *shared)


dispatch.declare(
    "hyper_attention",
    {
        "block_sparse": dispatch.Implementation(_block_sparse, pays=block_sparse.pays),
        "xla": dispatch.Implementation(_in_chunks),
        "reference": dispatch.Implementation(_reference),
    },
)
