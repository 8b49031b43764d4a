"""The public op: arguments, checks, the normaliser, and the choice of an implementation."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lcattn.errors import argument_error
from lcattn.ops import checks, dispatch
from lcattn.ops.linear_attention import chunked, features, kernel, recurrent
from lcattn.ops.linear_attention.features import FeatureMap
from lcattn.ops.linear_attention.state import LinearAttentionState, with_normalizer_as_value
from lcattn.typing import Array, Float, SegmentIds

dispatch.declare(
    "linear_attention",
    {
        "mosaic_gpu": dispatch.Implementation(kernel.attend, kernel.objection, kernel.pays),
        "xla": dispatch.Implementation(with_normalizer_as_value(chunked.attend)),
        "reference": dispatch.Implementation(with_normalizer_as_value(recurrent.attend)),
    },
)

# Tokens a chunk, and the length up to which one chunk (the quadratic form) is faster still; see
# benchmarks/. A GPU pays for every step of a loop, a CPU for every score.
_CHUNK = {"cpu": 128, "gpu": 256, "tpu": 256}
_QUADRATIC_UP_TO = {"cpu": 256, "gpu": 1024, "tpu": 1024}


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
      implementation: "mosaic_gpu" (a kernel for Hopper GPUs; its gradient cannot be differentiated
        again), "xla" (chunks), "reference" (token by token), or None for the best that serves.

    Returns:
      `[B,T,N,H]`, or that and the final `LinearAttentionState`.

    Raises:
      ValueError: for arguments that do not fit.
    """
    sizes = checks.check_heads(q, k, v, segment_ids)
    scale = checks.resolve_scale(scale, sizes.F)
    if chunk_size is not None:
        checks.check_size("chunk_size", chunk_size)
    if causal and sizes.T != sizes.S:
        raise argument_error("q", f"T={sizes.S} queries, as many as keys, when causal", sizes.T)
    if normalize is None:
        normalize = features.is_normalized_by_default(feature_map)
    similarity, q_mapped, k_mapped = features.resolve(feature_map, q, k)
    dtype = checks.accumulation_dtype(q.dtype)
    state_shape = (sizes.B, sizes.K, features.feature_size(similarity, k_mapped), sizes.H)
    state = _checked(initial_state, normalize, state_shape, dtype)
    run = dispatch.choose(
        "linear_attention", implementation,
        sizes=sizes, dtype=q.dtype, feature_map=feature_map, normalize=normalize, causal=causal,
        segment_ids=segment_ids, scale=scale, chunk_size=chunk_size,
    )  # fmt: skip
    out, state = run(
        similarity, q_mapped, k_mapped, v, segment_ids, state,
        normalize=normalize, causal=causal, scale=scale,
        chunk_size=chunk_size or _default_chunk(sizes.S),
    )  # fmt: skip
    out = out.astype(q.dtype)
    return (out, state) if return_state else out


def linear_attention_state(
    batch_size: int,
    num_kv_heads: int,
    key_size: int,
    value_size: int,
    *,
    feature_map: FeatureMap = "taylor",
    normalize: bool | None = None,
    dtype: DTypeLike = jnp.float32,
) -> LinearAttentionState:
    """The state before the first token: zeros of the right shape.

    Args:
      batch_size: B.
      num_kv_heads: K.
      key_size: F, the size of q and k before the feature map.
      value_size: H.
      feature_map: as in `linear_attention`.
      normalize: as in `linear_attention`.
      dtype: float32, or float64 for float64 inputs.
    """
    if normalize is None:
        normalize = features.is_normalized_by_default(feature_map)
    probe = jnp.zeros((1, 1, 1, key_size), dtype)
    similarity, _, mapped = features.resolve(feature_map, probe, probe)
    size = features.feature_size(similarity, mapped)
    kv = jnp.zeros((batch_size, num_kv_heads, size, value_size), dtype)
    return LinearAttentionState(kv=kv, normalizer=kv[..., 0] if normalize else None)


def _default_chunk(length: int) -> int:
    platform = dispatch.default_platform()
    return length if length <= _QUADRATIC_UP_TO[platform] else _CHUNK[platform]


def _checked(
    state: LinearAttentionState | None, normalize: bool, shape, dtype
) -> LinearAttentionState | None:
    if state is None:
        return None
    checks.check_shape("initial_state.kv", state.kv, shape, "[B,K,D,H]")
    if normalize != (state.normalizer is not None):
        wanted = "a normalizer" if normalize else "no normalizer"
        raise argument_error("initial_state", f"{wanted}, as normalize={normalize}", "the opposite")
    if state.normalizer is not None:
        checks.check_shape("initial_state.normalizer", state.normalizer, shape[:-1], "[B,K,D]")
    return jax.tree.map(lambda x: x.astype(dtype), state)
