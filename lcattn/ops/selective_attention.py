"""Selective attention (SSA): softmax attention whose queries and values have temperatures."""

import jax.numpy as jnp
from jax import lax

from lcattn.ops import checks, dispatch, sharding
from lcattn.ops.softmax_attention import softmax_attention
from lcattn.typing import Array, Float, Int, SegmentIds

# What runs is softmax attention.
dispatch.declare("selective_attention", dispatch.OPS["softmax_attention"])


@sharding.partitioned
def selective_attention(
    q: Float[Array, "B T N F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K H"],
    query_temperature: Float[Array, "B T N"] | None = None,
    value_temperature: Float[Array, "B S K"] | None = None,
    *,
    causal: bool = True,
    segment_ids: SegmentIds | None = None,
    scale: float | None = None,
    window: int | None = None,
    query_position: int | Int[Array, ""] | None = None,
    key_position: int | Int[Array, ""] = 0,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    r"""Softmax attention with a gate on each query and on each value.

    Layout `[B,T,N,H]`; temperatures multiply in float32, output in the dtype of `q`.

    .. math::
        o_t = \sum_{s \in V(t)} \mathrm{softmax}_s(\mathrm{scale} \cdot \tau^q_t\, q_t^\top k_s)\;
              \tau^v_s v_s

    "Temperatures" of this literature are inverse ones: they multiply. Raising the query's always
    sharpens its row (the entropy falls by tau times the variance of the scores), lowering it to 0
    averages; the value's turns a token down for every query at once. Learned from the token and
    from the number n of keys it sees, tau = tanh(f(x)) + 1 + a ln n, they separate how sparse a
    row is from what it is about, and counter the flattening of long rows
    (`lcattn.nn.SelectiveAttention`).

    Since scalars commute with rotations and with the product, both are folded into q and v before
    `softmax_attention`: its time, memory, kernels and cache, to which the scaled values go. The
    gradient of a query's temperature is q · dq of that call. Without temperatures, or where all
    are 1, this is `softmax_attention` to the bit. TempScale (arXiv 2410.24200) is the constant
    `query_temperature` 1/T, and scalable softmax is s ln n.

    Source: Zhang et al. 2024, "Selective Attention: Enhancing Transformer through Principled
    Context Control" (arXiv 2411.12892). The published code holds the position term only,
    materialises T·T scores, takes n = 1 in every cached step, and ignores masks given to it.

    Args:
      q: queries `[B,T,N,F]`.
      k: keys `[B,S,K,F]`; K divides N.
      v: values `[B,S,K,H]`.
      query_temperature: inverse temperature of each query `[B,T,N]`. None: 1.
      value_temperature: factor of each value `[B,S,K]`. None: 1. It is not a factor of outputs,
        as in some re-implementations.
      causal, segment_ids, scale, window, query_position, key_position, implementation: as in
        `softmax_attention`.

    Returns:
      `[B,T,N,H]`.

    Raises:
      ValueError: for arguments that do not fit.
    """
    checks.check_heads(q, k, v, segment_ids)
    if query_temperature is not None:
        checks.check_shape("query_temperature", query_temperature, q.shape[:3], "[B,T,N]")
        q = temper(q, query_temperature)
    if value_temperature is not None:
        checks.check_shape("value_temperature", value_temperature, v.shape[:3], "[B,S,K]")
        v = temper(v, value_temperature)
    out = softmax_attention(
        q, k, v,
        causal=causal, segment_ids=segment_ids, scale=scale, window=window,
        query_position=query_position, key_position=key_position, implementation=implementation,
    )  # fmt: skip
    assert not isinstance(out, tuple)
    return out


def temper(
    x: Float[Array, "B T N H"], temperature: Float[Array, "B T N"]
) -> Float[Array, "B T N H"]:
    """Queries or values times their temperatures, multiplied in float32."""
    dtype = checks.accumulation_dtype(x.dtype)
    product = x.astype(dtype) * temperature.astype(dtype)[..., None]
    # A cast alone XLA may skip in one use and not in the next. Then a row's maximum is not that of
    # the scores it is subtracted from, which overflows where scores are huge.
    narrow = jnp.finfo(x.dtype)
    return lax.reduce_precision(product, narrow.nexp, narrow.nmant).astype(x.dtype)
