"""The public op: arguments, checks, the normaliser, and the choice of an implementation."""

from collections.abc import Callable

from lcattn.errors import argument_error
from lcattn.ops import checks, dispatch, sharding
from lcattn.ops.linear_attention import chunked, features, gpu_kernel, recurrent, step, tpu_kernel
from lcattn.ops.linear_attention.features import FeatureMap
from lcattn.ops.linear_attention.state import (
    LinearAttentionState,
    divided,
    merged,
    split,
    with_normalizer,
)
from lcattn.typing import Array, Float, SegmentIds


def _by_sums(attend: Callable) -> Callable:
    """An implementation of the op, from one that only sums values."""

    def run(similarity, q, k, v, segment_ids, state, *, normalize: bool, **options):
        state = merged(state, normalize, similarity, k, v)
        v = with_normalizer(v, normalize)
        sums, state = attend(similarity, q, k, v, segment_ids, state, **options)
        return divided(sums, normalize), split(state, normalize)

    return run


dispatch.declare(
    "linear_attention",
    {
        "mosaic_gpu": dispatch.Implementation(
            gpu_kernel.attend, gpu_kernel.objection, gpu_kernel.pays, dispatch.no_hopper
        ),
        "mosaic_tpu": dispatch.Implementation(
            tpu_kernel.attend, tpu_kernel.objection, dispatch.only_when_named, dispatch.no_tpu
        ),
        "step": dispatch.Implementation(step.attend, step.objection),
        "xla": dispatch.Implementation(_by_sums(chunked.attend)),
        "reference": dispatch.Implementation(_by_sums(recurrent.attend)),
    },
)


@sharding.partitioned
def linear_attention(
    q: Float[Array, "B T N F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = True,
    segment_ids: SegmentIds | None = None,
    scale: float | None = None,
    feature_map: FeatureMap = "taylor",
    normalize: bool | None = None,
    initial_state: LinearAttentionState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], LinearAttentionState]:
    r"""Attention whose weights are inner products of features, computed in linear time.

    Layout `[B,T,N,H]`; scores, sums and state in float32, output in the dtype of `q`.

    .. math::
        o_t = \frac{\sum_{s \le t} p(q_t, k_s)\, v_s}{\sum_{s \le t} p(q_t, k_s)}, \qquad
        p(q, k) = \phi(q)^\top \phi(k)

    Since p factors, the sums are a state of fixed size, S_t = S_{t-1} + phi(k_t) v_tᵀ, and
    o_t = phi(q_t)ᵀ S_t: a recurrent network with a matrix for a memory. Training runs it in
    chunks of C tokens: inside a chunk by the quadratic form, between chunks by the state.

    Time O(T·(C·(F+H) + D·H)) and memory O(T) with D features, also for the gradient: chunk states
    are recomputed on the way back, not stored.

    With `feature_map="taylor"` this is BASED (Arora et al. 2024, arXiv 2402.18668): p = 1 + x +
    x²/2 with x = scale q·k; give it a small F, such as 16. The published decoding code skips the
    feature map in the prompt and keeps the state in bfloat16, which stops counting at 256 tokens;
    here prompt and step are the same function and the state is float32. `"elu"` is elu + 1
    (Katharopoulos et al. 2020, arXiv 2006.16236). `"identity"` is plain fast weights.

    Args:
      q: queries `[B,T,N,F]`.
      k: keys `[B,S,K,F]`; K divides N.
      v: values `[B,S,K,H]`.
      causal: query t sees keys 0..t, and T = S. Otherwise every query sees every key.
      segment_ids: document of each token `[B,T]`, for packed rows.
      scale: factor of q·k inside the Taylor series, and of p for the other maps. Default
        `F ** -0.5`; pass it for a callable that changes the size.
      feature_map: "taylor", "elu", "identity", or a function over the last axis of q and of k.
      normalize: divide by the sum of weights. Default: yes, except for "identity", whose weights
        change sign so that their sum can vanish. Rows whose weights sum to 0 give zeros.
      initial_state: the state to start from; it belongs to the first document of each row.
      return_state: also return the state after the last token (of the last document).
      chunk_size: tokens a chunk; default: by length. Changes speed and memory, never the result.
      implementation: "mosaic_gpu" and "mosaic_tpu" (kernels for Hopper GPUs and for TPUs; their
        gradient cannot be differentiated again, and over several devices they belong inside
        `jax.shard_map(..., check_vma=False)`), "step" (one token: T = 1), "xla" (chunks),
        "reference" (token by token), or None for the best that serves and was timed: those for
        TPUs run only when named.

    Returns:
      `[B,T,N,H]`, or that and the final `LinearAttentionState`.

    Raises:
      ValueError: for arguments that do not fit.
    """
    sizes = checks.check_heads(q, k, v, segment_ids)
    scale = checks.resolve_scale(scale, sizes.F)
    if causal and sizes.T != sizes.S:
        raise argument_error("q", f"T={sizes.S} queries, as many as keys, when causal", sizes.T)
    if normalize is None:
        normalize = features.is_normalized_by_default(feature_map)
    run = dispatch.choose(
        "linear_attention", implementation,
        sizes=sizes, dtype=q.dtype, feature_map=feature_map, normalize=normalize, causal=causal,
        segment_ids=segment_ids, scale=scale, chunk_size=chunk_size,
    )  # fmt: skip
    chunk_size = chunked.resolve_chunk(chunk_size, sizes.S)
    similarity, queries, keys = features.resolve(feature_map, q, k)
    out, state = run(
        similarity, queries, keys, v, segment_ids, initial_state,
        normalize=normalize, causal=causal, scale=scale, chunk_size=chunk_size,
    )  # fmt: skip
    out = out.astype(q.dtype)
    return (out, state) if return_state else out
