"""The public op: arguments, checks and the choice of an implementation."""

import jax.numpy as jnp

from lcattn.errors import argument_error
from lcattn.ops import checks, dispatch, sharding
from lcattn.ops.block_sparse_attention import visible
from lcattn.ops.softmax_attention import block_sparse, chunked, cudnn, dense
from lcattn.ops.softmax_attention.alibi import Alibi
from lcattn.ops.visibility import visibility
from lcattn.typing import Array, Float, Int, SegmentIds

dispatch.declare(
    "softmax_attention",
    {
        "cudnn": dispatch.Implementation(cudnn.attend, cudnn.objection),
        "block_sparse": dispatch.Implementation(
            block_sparse.attend, block_sparse.objection, visible.pays
        ),
        "xla": dispatch.Implementation(chunked.attend_xla),
        "reference": dispatch.Implementation(dense.reference),
    },
)


@sharding.partitioned
def softmax_attention(
    q: Float[Array, "B T N F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = True,
    segment_ids: SegmentIds | None = None,
    scale: float | None = None,
    window: int | None = None,
    sinks: int = 0,
    alibi_slopes: Float[Array, "N"] | None = None,
    query_position: int | Int[Array, ""] | None = None,
    key_position: int | Int[Array, ""] = 0,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    r"""Softmax attention over all visible keys, or over a sliding window of them.

    Layout `[B,T,N,H]`; scores, sums and log-sum-exps in float32, output in the dtype of `q`.

    .. math::
        o_t = \sum_{s \in V(t)} \frac{e^{x_{ts}}}{\sum_{r \in V(t)} e^{x_{tr}}} v_s, \qquad
        x_{ts} = \mathrm{scale} \cdot q_t^\top k_s - m_n |t - s|

    where V(t) holds the keys that t sees: the past including t (`causal`), the last `window` of
    them and the first few (`sinks`), those of its own document (`segment_ids`). The slope m_n of
    head n is 0 without `alibi_slopes`. A query that sees no key gives zeros.

    Time O(T·S), or O(T·window); memory O(T) in both passes above 512 tokens.

    Args:
      q: queries `[B,T,N,F]`.
      k: keys `[B,S,K,F]`; K divides N, and head n reads key head `n // (N // K)`.
      v: values `[B,S,K,H]`; H is mostly F.
      causal: query t sees no key after it.
      segment_ids: document of each token `[B,T]`, for packed rows (T = S).
      scale: factor of the scores; default `F ** -0.5`.
      window: number of keys seen, the query's own included. Needs `causal`.
      sinks: the first keys of a document, which stay in sight when the window has passed them
        (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453).
      alibi_slopes: slope of each query head, float32 `[N]` (Press et al. 2021, arXiv 2108.12409);
        see `lcattn.ops.alibi_slopes`.
      query_position: position of the first query. Default `key_position + S - T`: the queries are
        the last T tokens. May be traced, so that a cache of fixed size can be filled under `jit`.
      key_position: position of the first key. Keys at negative positions do not exist.
      return_lse: also return the log of each softmax denominator, `[B,T,N]` float32, -inf where
        no key is seen. Gradients flow through it, so that partial results can be merged.
      implementation: "cudnn" (GPU; whole sequences, and one token against a cache),
        "block_sparse" (by a plan of blocks, in the best form of `block_sparse_attention`), "xla"
        (anywhere), "reference" (the definition, T·S memory), or None for the first of them that
        serves the call; a plan only from 4096 tokens on, where kernels for Hopper GPUs run it.

    Returns:
      `[B,T,N,H]`, or that and the log-sum-exp.

    Raises:
      ValueError: for arguments that do not fit.
    """
    sizes = checks.check_heads(q, k, v, segment_ids)
    scale = checks.resolve_scale(scale, sizes.F)
    if window is not None:
        checks.check_size("window", window)
        if not causal:
            raise argument_error("window", "None when causal is False", repr(window))
        if window >= sizes.S and query_position is None:
            window = None
    if isinstance(sinks, bool) or not isinstance(sinks, int) or sinks < 0:
        raise argument_error("sinks", "a whole number of at least 0", repr(sinks))
    if window is None:
        sinks = 0  # all are in sight anyway
    if alibi_slopes is not None:
        checks.check_shape("alibi_slopes", alibi_slopes, (sizes.N,), "[N]")
    has_all_keys = isinstance(key_position, int) and key_position == 0
    is_aligned = has_all_keys and query_position is None
    query_position = checks.resolve_query_position(
        query_position, sizes, causal=causal, segment_ids=segment_ids, key_position=key_position
    )
    run = dispatch.choose(
        "softmax_attention", implementation,
        sizes=sizes, dtype=q.dtype, causal=causal, segment_ids=segment_ids,
        alibi_slopes=alibi_slopes, window=window, sinks=sinks, has_all_keys=has_all_keys,
        is_aligned=is_aligned, return_lse=return_lse,
    )  # fmt: skip
    seen = visibility(
        sizes.T, sizes.S, causal=causal, window=window, sinks=sinks, segment_ids=segment_ids,
        query_position=query_position, key_position=key_position,
    )  # fmt: skip
    alibi = None
    if alibi_slopes is not None:
        alibi = Alibi(
            alibi_slopes.astype(checks.accumulation_dtype(q.dtype)),
            query_position + jnp.arange(sizes.T, dtype=jnp.int32),
            key_position + jnp.arange(sizes.S, dtype=jnp.int32),
        )
    out, lse = run(
        q, k, v,
        visibility=seen, alibi=alibi, scale=scale, causal=causal, window=window, sinks=sinks,
        is_plain=is_aligned and segment_ids is None and not sinks, return_lse=return_lse,
    )  # fmt: skip
    return (out, lse) if return_lse else out
