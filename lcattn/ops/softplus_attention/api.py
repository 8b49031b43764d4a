"""The public op: arguments, checks, normalised queries and keys, and the rows' statistics."""

import math

import jax.numpy as jnp

from lcattn.errors import argument_error
from lcattn.ops import checks, dispatch, sharding
from lcattn.ops.softplus_attention import chunked, dense, gpu_kernel, step, tpu_kernel
from lcattn.ops.softplus_attention.rows import Reweighting, Rows
from lcattn.ops.visibility import visibility
from lcattn.typing import Array, Float, Int, SegmentIds

dispatch.declare(
    "softplus_attention",
    {
        "mosaic_gpu": dispatch.Implementation(
            gpu_kernel.attend, gpu_kernel.objection, gpu_kernel.pays, dispatch.no_hopper
        ),
        "mosaic_tpu": dispatch.Implementation(
            tpu_kernel.attend, tpu_kernel.objection, dispatch.only_when_named, dispatch.no_tpu
        ),
        "step": dispatch.Implementation(step.attend, step.objection, step.pays),
        "xla": dispatch.Implementation(chunked.attend),
        "reference": dispatch.Implementation(dense.reference),
    },
)


@sharding.partitioned
def softplus_attention(
    q: Float[Array, "B T N F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = True,
    segment_ids: SegmentIds | None = None,
    scale: float | None = None,
    power: float | None = None,
    offset: float = 1.0,
    exempt_rows: int = 3,
    query_position: int | Int[Array, ""] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    r"""Softplus attention on length-scaled cosines, sharpened by a power (LSSA and LSSAR).

    Layout `[B,T,N,H]`; scores, sums and weights in float32, output in the dtype of `q`.

    .. math::
        a_{ts} = \mathrm{softplus}\Bigl(c_t \frac{q_t^\top k_s}{\|q_t\| \|k_s\|}\Bigr), \qquad
        c_t = \mathrm{scale} \cdot \ln n_t, \qquad
        A_{ts} = \frac{a_{ts}}{\sum_{r \in V(t)} a_{tr}}

    where V(t) holds the n_t keys that t sees. Without `power` the output is the mean of values
    weighted by A (LSSA). With it (LSSAR), keys of more than `offset` times the mean weight are
    kept, their excess is raised to the power, and rows are normalised again:

    .. math::
        y_{ts} = \max(n_t A_{ts} - o_t, 0), \qquad P_{ts} = y_{ts}^p \Big/ \sum_r y_{tr}^p

    with o_t = `offset`, or 0 in rows that see at most `exempt_rows` keys. Exp and its runaway
    maxima are gone, ln n_t keeps the entropy of a row level as it grows, and the power removes the
    tail that dilutes long rows: models trained on 1k tokens hold at 8k with p = 15.

    Source: Gao & Spratling 2025, "Softplus Attention with Re-weighting Boosts Length Extrapolation
    in Large Language Models" (arXiv 2501.13428). Time O(T·S), with two passes over the keys
    forward and two backward; memory O(T · block) in both directions.

    What differs from published code, and why:

    - n_t counts the keys that a row sees; published code takes the row's index, which is wrong for
      packed documents and padding, for the length scale as for the exempt rows.
    - y^p overflows float32 from y = 370 on (p = 15) and underflows below 3e-3. It is divided by the
      row's maximum first, which is exact, so that no epsilon (published: 1e-8) halves weak rows.
    - In a flat row (all keys alike) no key exceeds the mean, y = 0. Where max y <= 1e-5, about the
      rounding of a row's sum in float32, P is A.

    Args:
      q: queries `[B,T,N,F]`. Their norms do not matter, nor do those of the keys.
      k: keys `[B,S,K,F]`; K divides N.
      v: values `[B,S,K,H]`.
      causal: query t sees no key after it.
      segment_ids: document of each token `[B,T]`, for packed rows (T = S).
      scale: factor of ln(n) in c. Default: ln(F), tuned in the paper at F = 64, T = 1024.
      power: p, at least 1 (below, the gradient is unbounded at the threshold); 15 for lengths
        beyond training, 3 within. None: LSSA.
      offset: threshold on the weight relative to the row's mean, at least 0.
      exempt_rows: rows that see at most so many keys have threshold 0.
      query_position: position of the first query, that of the first key being 0. Default: the
        queries are the last T tokens. May be traced, to fill a cache of fixed size.
      implementation: "mosaic_gpu" (Hopper GPUs; causal, bfloat16, F = H = 64 or 128, whole powers),
        "mosaic_tpu" (TPUs; causal, bfloat16 or float32, whole powers), "step" (one query), "xla"
        (blocks), "reference" (the definition, T·S memory), or None: the kernels for GPUs where
        they serve and win; those for TPUs run only when named. Over several devices the
        kernels belong inside `jax.shard_map(..., check_vma=False)`.

    Returns:
      `[B,T,N,H]`.

    Raises:
      ValueError: for arguments that do not fit.
    """
    sizes = checks.check_heads(q, k, v, segment_ids)
    scale = math.log(sizes.F) if scale is None else checks.resolve_scale(scale, sizes.F)
    reweighting = None if power is None else _reweighting(power, offset, exempt_rows)
    is_aligned = sizes.T == sizes.S and query_position is None
    query_position = checks.resolve_query_position(
        query_position, sizes, causal=causal, segment_ids=segment_ids
    )
    seen = visibility(
        sizes.T, sizes.S,
        causal=causal, segment_ids=segment_ids, query_position=query_position,
    )  # fmt: skip
    dtype = checks.accumulation_dtype(q.dtype)
    lengths = seen.num_keys()
    rows = Rows(
        length_scale=scale * jnp.log(jnp.maximum(lengths, 1).astype(dtype)),
        length=lengths.astype(dtype),
        offset=jnp.where(lengths <= exempt_rows, 0, jnp.asarray(offset, dtype)),
    )
    run = dispatch.choose(
        "softplus_attention", implementation, sizes=sizes, dtype=q.dtype, causal=causal,
        is_aligned=is_aligned, scale=scale, power=power,
    )  # fmt: skip
    is_packed = segment_ids is not None
    return run(q, k, v, rows, seen, reweighting, is_packed=is_packed)


def _reweighting(power: float, offset: float, exempt_rows: int) -> Reweighting:
    if isinstance(power, bool) or not (power >= 1 and math.isfinite(power)):
        raise argument_error("power", "None or a number of at least 1", repr(power))
    if not (offset >= 0 and math.isfinite(offset)):
        raise argument_error("offset", "a number of at least 0", repr(offset))
    if isinstance(exempt_rows, bool) or exempt_rows < 0:
        raise argument_error("exempt_rows", "a whole number of at least 0", repr(exempt_rows))
    return Reweighting(float(power))
