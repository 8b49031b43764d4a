"""Linear attention with a state that forgets: retention, Mamba-2 and GLA are cases of it."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from lcattn.ops import checks, dispatch, recurrence
from lcattn.ops.chunks import cut, einsum, paste
from lcattn.ops.decay import (
    ChunkDecay,
    between_tokens,
    check_log_decay,
    forget_at_documents,
    inside_chunks,
)
from lcattn.ops.triangular import halves, merge
from lcattn.typing import Array, Float, SegmentIds

# The shortest length measured, and there the kernels take a quarter of XLA's time: benchmarks/h200.
_KERNELS_PAY_FROM = 256


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
      implementation: "mosaic_gpu" (kernels for Hopper GPUs: bfloat16, F and H of 64 or 128,
        F <= H), "mosaic_tpu" (kernels for TPUs: bfloat16 or float32, F and H multiples of 8; for
        the gradient they keep a state every few hundred tokens), "xla" (chunks), "reference"
        (token by token), or None for "xla": the kernels run only when named.

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
        dtype=jnp.result_type(q, k, v), chunk_size=chunk_size,
    )  # fmt: skip

    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    heads, keys, values = recurrence.group_by_state(q, k, v, states=log_decay.shape[2])
    keys, log_decay = forget_at_documents(keys, log_decay, segment_ids)
    state = recurrence.start(initial_state, keys, values)
    out, state = run(heads, keys, values, log_decay, state, scale=scale, chunk=chunk)
    out = recurrence.finish(out, segment_ids, q.dtype)
    return (out, state) if return_state else out


def _token_by_token(q, k, v, log_decay, state, *, scale, chunk):
    del chunk

    def step(state, q, k, v, log_decay):
        state = jnp.exp(log_decay)[..., None] * state + jnp.einsum("bmf,bmh->bmfh", k, v)
        return state, scale * jnp.einsum("bmgf,bmfh->bmgh", q, state)

    return recurrence.token_by_token(step, state, q, k, v, log_decay)


def _chunked(q, k, v, log_decay, state, *, scale, chunk):
    r"""All chunks at once, but for the state, which a scan carries from chunk to chunk.

    With G the log decay from the start of a chunk, and S the state there:

        O  = A V + (Q e^G) S        A_ts = sum_c q_tc k_sc e^{G_tc - G_sc},  s <= t
        S' = e^{G_C} S + (K e^{G_C - G})^T V
    """

    @jax.checkpoint  # keep the inputs only; states and scores are recomputed for the gradient
    def attend(q, k, v, log_decay, state):
        q, k, v, log_decay = (cut(x, chunk) for x in (q, k, v, log_decay))
        decay = inside_chunks(log_decay.astype(state.dtype))
        scores = _scores(q, k, decay)
        writes = einsum("...sf,...sh->...fh", k * jnp.exp(decay.after), v, like=v)
        states, final = _carry(state, jnp.exp(decay.total), writes)
        out = einsum("...gts,...sh->...gth", scores, v, like=v)
        queries = q * jnp.exp(decay.before)[..., None, :, :]
        return out + einsum("...gtf,...fh->...gth", queries, states, like=q), final

    out, final = attend(q, k, v, log_decay, state)
    return scale * paste(out, q.shape[1]), final


def _scores(q: Array, k: Array, decay: ChunkDecay) -> Float[Array, "*chunks G C C"]:
    """Decayed inner products of queries `[...,G,C,F]` with keys `[...,C,F]` not after them."""
    if decay.before.shape[-1] == 1:
        factors = jnp.exp(between_tokens(decay))
        return factors[..., None, :, :] * einsum("...gtf,...sf->...gts", q, k, like=q)

    blocks = einsum("...gtf,...tf->...gt", q, k, like=q)[..., None, None]
    for to_right, from_left in decay.halves:
        m, h = to_right.shape[-3:-1]
        _, queries = halves(q.reshape(*q.shape[:-2], 2 * m, h, q.shape[-1]))
        keys, _ = halves(k.reshape(*k.shape[:-2], 2 * m, h, k.shape[-1]))
        queries = queries * jnp.exp(to_right)[..., None, :, :, :]
        keys = keys * jnp.exp(from_left)
        squares = einsum("...gmtf,...msf->...gmts", queries, keys, like=q)
        blocks = merge(blocks, squares)
    return blocks[..., 0, :, :]


def _carry(state: Array, decay: Array, writes: Array) -> tuple[Array, Array]:
    """The state before each chunk, and after the last."""

    def step(state, chunk):
        decay, write = chunk
        return decay[..., None] * state + write, state

    final, states = lax.scan(step, state, (decay, writes))
    return states, final


def _kernels(q, k, v, log_decay, state, *, scale, chunk):
    from pallas_kernels.gated_linear_attention import mosaic_gpu

    del chunk  # they have their own
    run = functools.partial(mosaic_gpu.gated_linear_attention, scale=scale)
    return _by_kernels(run, q, k, v, log_decay, state)


def _tpu_kernels(q, k, v, log_decay, state, *, scale, chunk):
    from pallas_kernels.gated_linear_attention import mosaic_tpu

    del chunk  # they have their own
    out, state = _by_kernels(mosaic_tpu.gated_linear_attention, q, k, v, log_decay, state)
    return scale * out, state


def _by_kernels(run, q, k, v, log_decay, state):
    """Attention by kernels `run`, which take no groups of heads."""
    B, T, M, G, F = q.shape
    out, state = run(q.reshape(B, T, M * G, F), k, v, log_decay, state)
    return out.reshape(B, T, M, G, -1), state


def _kernels_objection(*, sizes: checks.Sizes, dtype: jnp.dtype, **call) -> str | None:
    """Why the kernels cannot serve a call, in words."""
    del call
    # Imported where it can run: it takes longer to import than the rest of the ops.
    from pallas_kernels.gated_linear_attention import mosaic_gpu

    return mosaic_gpu.objection(dtype=dtype, F=sizes.F, H=sizes.H)


def _kernels_pay(*, sizes: checks.Sizes, chunk_size: int | None, **call) -> bool:
    """Whether the kernels are the better choice where they can serve.

    They walk chunks of their own size, and compilers cannot partition them: over several devices
    they belong inside `shard_map`, and only who writes that can tell.
    """
    del call
    return sizes.T >= _KERNELS_PAY_FROM and chunk_size is None and jax.device_count() == 1


def _tpu_objection(*, sizes: checks.Sizes, states: int, dtype: jnp.dtype, **call) -> str | None:
    """Why the kernels for TPUs cannot serve a call, in words."""
    del call
    from pallas_kernels.gated_linear_attention import mosaic_tpu

    return mosaic_tpu.objection(dtype=dtype, groups=sizes.N // states, F=sizes.F, H=sizes.H)


dispatch.declare(
    "gated_linear_attention",
    {
        "mosaic_gpu": dispatch.Implementation(
            _kernels, _kernels_objection, _kernels_pay, dispatch.no_hopper
        ),
        "mosaic_tpu": dispatch.Implementation(
            _tpu_kernels, _tpu_objection, dispatch.only_when_named, dispatch.no_tpu
        ),
        "xla": dispatch.Implementation(_chunked),
        "reference": dispatch.Implementation(_token_by_token),
    },
)
