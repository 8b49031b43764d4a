"""The public op: arguments, checks and the choice of an implementation."""

from lcattn.ops import checks, dispatch, recurrence, sharding
from lcattn.ops.decay import check_log_decay, forget_at_documents
from lcattn.ops.gated_linear_attention import chunked, gpu_kernel, recurrent, tpu_kernel
from lcattn.typing import Array, Float, SegmentIds

dispatch.declare(
    "gated_linear_attention",
    {
        "mosaic_gpu": dispatch.Implementation(
            gpu_kernel.attend, gpu_kernel.objection, gpu_kernel.pays, dispatch.no_hopper
        ),
        "mosaic_tpu": dispatch.Implementation(
            tpu_kernel.attend, tpu_kernel.objection, dispatch.only_when_named, dispatch.no_tpu
        ),
        "xla": dispatch.Implementation(chunked.attend),
        "reference": dispatch.Implementation(recurrent.attend),
    },
)


@sharding.partitioned
def gated_linear_attention(
    q: Float[Array, "B T N F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K H"],
    log_decay: Float[Array, "B T M"] | Float[Array, "B T M F"],
    *,
    causal: bool = True,
    segment_ids: SegmentIds | None = None,
    scale: float | None = None,
    initial_state: Float[Array, "B M F H"] | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B M F H"]]:
    r"""Linear attention whose state decays, by head or by channel.

    Layout `[B,T,N,H]`; decays, scores and state in float32, output in the dtype of `q`.

    .. math::
        S_t = \mathrm{diag}(e^{g_t})\, S_{t-1} + k_t v_t^\top, \qquad
        o_t = \mathrm{scale} \cdot S_t^\top q_t

    with `g = log_decay <= 0`. A token decays what was before it, not itself. Without the
    recurrence:

    .. math::
        o_t = \mathrm{scale} \sum_{s \le t} \Big(\sum_c q_{tc}\, k_{sc}\,
              e^{g_{s+1,c} + \dots + g_{t,c}}\Big) v_s

    - retention (Sun et al. 2023, arXiv 2307.08621): g constant, one a head;
    - Mamba-2 / SSD (Dao and Gu 2024, arXiv 2405.21060): g = Delta a, k = B, v = Delta u, q = C,
      scale = 1;
    - GLA (Yang et al. 2023, arXiv 2312.06635): g a function of the token, one a channel;
    - `linear_attention(feature_map="identity")`: g = 0.

    Time O(T·(C·(F+H) + F·H)); memory O(T·(C + F·H/C)) while it runs, and between the forward and
    the backward pass nothing but the inputs: chunk states are recomputed.

    The published chunked forms take e^{G_t - G_s} from cumulative sums G and refer each block of 16
    tokens to its first row; the blocks on the diagonal go channel by channel without matrix units.
    Here halves of ever larger blocks refer to the border between them (`decay`, `triangular`):
    exponents are sums of terms <= 0, so that no decay is too strong. `-inf` resets a channel, with
    exact values and gradients.

    Args:
      q: queries `[B,T,N,F]`.
      k: keys `[B,T,K,F]`; K divides N.
      v: values `[B,T,K,H]`.
      log_decay: `[B,T,M]`, one a head, or `[B,T,M,F]`, one a channel; all <= 0. M is N, or K where
        the N/K query heads of a group read one state.
      causal: only True; a state that forgets has a direction.
      segment_ids: document of each token `[B,T]`, for packed rows.
      scale: factor of the output. Default: `F ** -0.5`.
      initial_state: `[B,M,F,H]`; it belongs to the first document of each row.
      return_state: also return the state after the last token (of the last document), float32.
      chunk_size: tokens a chunk C, rounded up to a power of two; default 64. Changes speed and
        memory, never the result.
      implementation: "mosaic_gpu" (kernels for Hopper GPUs: bfloat16, F up to 128; channels and
        values are padded to 64 or 128), "mosaic_tpu" (kernels for TPUs: bfloat16 or float32, F and
        H multiples of 8; for the gradient they keep a state every few hundred tokens), "xla"
        (chunks), "reference" (token by token), or None: on one Hopper GPU "mosaic_gpu", from 256
        tokens on and without `chunk_size`; else "xla". Only "xla" and "reference" have forward-mode
        and second derivatives: kernels have a backward pass of their own, and calls that need more
        have to name a form.

    Returns:
      `[B,T,N,H]`, or that and the final state.

    Raises:
      ValueError: for arguments that do not fit.
    """
    sizes = recurrence.check_arrays(q, k, v, segment_ids, causal=causal)
    scale = checks.resolve_scale(scale, sizes.F)
    chunk = recurrence.chunk_length(chunk_size, sizes.T)
    by_head = [(sizes.B, sizes.T, heads) for heads in (sizes.N, sizes.K)]
    check_log_decay(
        log_decay, [*by_head, *((*shape, sizes.F) for shape in by_head)],
        f"shape [B,T,M] or [B,T,M,F] with B, T, F = {sizes.B, sizes.T, sizes.F} and"
        f" M = N = {sizes.N} or K = {sizes.K}",
    )  # fmt: skip
    run = dispatch.choose(
        "gated_linear_attention", implementation, sizes=sizes, states=log_decay.shape[2],
        dtype=q.dtype, scale=scale, chunk_size=chunk_size,
    )  # fmt: skip

    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    heads, keys, values = recurrence.group_by_state(q, k, v, states=log_decay.shape[2])
    keys, log_decay = forget_at_documents(keys, log_decay, segment_ids)
    state = recurrence.start(initial_state, keys, values)
    out, state = run(heads, keys, values, log_decay, state, scale=scale, chunk=chunk)
    out = recurrence.finish(out, segment_ids, q.dtype)
    return (out, state) if return_state else out
