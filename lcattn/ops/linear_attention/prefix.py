"""Linear attention that reads a prefix before it starts (JRT-RNN)."""

import functools

import jax.numpy as jnp

from lcattn.errors import argument_error
from lcattn.ops import checks, dispatch, sharding
from lcattn.ops.linear_attention import chunked, features, recurrent
from lcattn.ops.linear_attention.features import FeatureMap
from lcattn.ops.linear_attention.state import (
    LinearAttentionState,
    divided,
    merged,
    split,
    with_normalizer,
)
from lcattn.typing import Array, Bool, Float, SegmentIds

dispatch.declare(
    "prefix_linear_attention",
    {
        "xla": dispatch.Implementation(chunked.attend),
        "reference": dispatch.Implementation(recurrent.attend),
    },
)


@sharding.partitioned
def prefix_linear_attention(
    q: Float[Array, "B T N F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K H"],
    prefix_k: Float[Array, "B M K F"],
    prefix_v: Float[Array, "B M K H"],
    *,
    causal: bool = True,
    prefix_mask: Bool[Array, "B M"] | None = None,
    segment_ids: SegmentIds | None = None,
    scale: float | None = None,
    feature_map: FeatureMap = "taylor",
    normalize: bool | None = None,
    initial_state: LinearAttentionState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], LinearAttentionState]:
    r"""Linear attention in which every token also sees all keys of a prefix, later ones included.

    Layout `[B,T,N,H]`; scores, sums and state in float32, output in the dtype of `q`.

    .. math::
        o_t = \frac{\sum_{j < M} p(q_t, k'_j)\, v'_j + \sum_{s \le t} p(q_t, k_s)\, v_s}
                   {\sum_{j < M} p(q_t, k'_j) + \sum_{s \le t} p(q_t, k_s)}

    A causal state must choose what to keep before it has seen the question. Here the first M tokens
    of a document are encoded with keys k' and values v' of their own, which every token sees, and
    are then read again causally: "just read twice" (Arora et al. 2024, arXiv 2407.05483). So
    **tokens of the prefix see each other both ways; those after it see only the past.**

    The prefix is a sum that starts the state, so decoding is `linear_attention` from
    `initial_state=` the state returned here: no prefix, no more memory.

    Time and memory as `linear_attention`, and 2·D·H operations more for each token of the prefix.

    Published code drops padding by zeroing its keys before the feature map, which leaves the weight
    phi(0) = 1 of each and its value (a third of the denominator, where half of the prefix is
    padding). Here `prefix_mask` and negative `segment_ids` take it out entirely.

    Args:
      q: queries `[B,T,N,F]`.
      k: keys `[B,T,K,F]`; K divides N.
      v: values `[B,T,K,H]`.
      prefix_k, prefix_v: keys `[B,M,K,F]` and values `[B,M,K,H]` of the first M <= T tokens of each
        row.
      causal: only True; without the causal part it is `linear_attention(causal=False)`.
      prefix_mask: which of these tokens belong to a prefix `[B,M]`. Default: all.
      segment_ids: document of each token `[B,T]`, for packed rows: a token sees the prefix keys of
        its own document. Then the prefix of each document has to be among the first M tokens.
      scale, feature_map, normalize, chunk_size, implementation: as in `linear_attention`.
      initial_state: the state to start from; it belongs to the first document of each row.
      return_state: also return the state after the last token (of the last document).

    Returns:
      `[B,T,N,H]`, or that and the final `LinearAttentionState`.

    Raises:
      ValueError: for arguments that do not fit.
    """
    sizes = checks.check_heads(q, k, v, segment_ids)
    if not causal or sizes.T != sizes.S:
        raise argument_error("causal", "True, and as many queries as keys", (causal, sizes.T))
    M = _check_prefix(prefix_k, prefix_v, prefix_mask, k, v)
    scale = checks.resolve_scale(scale, sizes.F)
    if normalize is None:
        normalize = features.is_normalized_by_default(feature_map)
    similarity, queries, keys = features.resolve(feature_map, q, k)
    _, _, prefix_keys = features.resolve(feature_map, q, prefix_k)
    state = merged(initial_state, normalize, similarity, keys, v)
    values, prefix_values = with_normalizer(v, normalize), with_normalizer(prefix_v, normalize)
    if prefix_mask is not None:
        # Without its value and its part of the normaliser, nothing is left of a key.
        prefix_values = jnp.where(prefix_mask[:, :, None, None], prefix_values, 0)
    run = functools.partial(
        dispatch.choose("prefix_linear_attention", implementation),
        similarity, scale=scale, chunk_size=chunked.resolve_chunk(chunk_size, sizes.S),
    )  # fmt: skip

    if segment_ids is None:
        _, state = run(queries[:, :1], prefix_keys, prefix_values, None, state, causal=False)
        out, state = run(queries, keys, values, None, state, causal=True)
    else:
        fill = ((0, 0), (0, sizes.T - M), (0, 0), (0, 0))
        prefix_keys, prefix_values = (jnp.pad(x, fill) for x in (prefix_keys, prefix_values))
        out, state = run(queries, keys, values, segment_ids, state, causal=True)
        seen, encoded = run(queries, prefix_keys, prefix_values, segment_ids, None, causal=False)
        out, state = out + seen, state + encoded
    out = divided(out, normalize).astype(q.dtype)
    return (out, split(state, normalize)) if return_state else out


def _check_prefix(k: Array, v: Array, mask: Array | None, like_k: Array, like_v: Array) -> int:
    B, T, K, F = like_k.shape
    M = k.shape[1] if k.ndim == 4 else 0
    if not 0 < M <= T:
        raise argument_error("prefix_k", f"shape [B,M,K,F] with M from 1 to T={T}", k.shape)
    checks.check_shape("prefix_k", k, (B, M, K, F), "[B,M,K,F]")
    checks.check_shape("prefix_v", v, (B, M, K, like_v.shape[-1]), "[B,M,K,H]")
    for name, x in (("prefix_k", k), ("prefix_v", v)):
        if x.dtype != like_k.dtype:
            raise argument_error(name, f"the dtype of k, {like_k.dtype}", x.dtype)
    if mask is not None:
        checks.check_shape("prefix_mask", mask, (B, M), "[B,M]")
    return M
