"""Linear attention that corrects what it stored: the delta rule, with or without decay."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lcattn.errors import argument_error
from lcattn.ops import checks, dispatch, recurrence, sharding
from lcattn.ops.chunks import cut, einsum, paste
from lcattn.ops.decay import between_tokens, check_log_decay, forget_at_documents, inside_chunks
from lcattn.ops.triangular import inverse
from lcattn.typing import Array, Float, SegmentIds


@sharding.partitioned
def gated_delta_rule(
    q: Float[Array, "B T N F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K H"],
    log_decay: Float[Array, "B T M"] | None = None,
    beta: Float[Array, "B T M"] | None = None,
    *,
    causal: bool = True,
    segment_ids: SegmentIds | None = None,
    scale: float | None = None,
    initial_state: Float[Array, "B M F H"] | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B M F H"]]:
    r"""Linear attention that writes the difference between a value and what its key recalls.

    Layout `[B,T,N,H]`; decays, corrections and state in float32, output in the dtype of `q`.

    .. math::
        \bar S_t = e^{g_t} S_{t-1}, \qquad
        S_t = \bar S_t + \beta_t\, k_t\, (v_t - \bar S_t^\top k_t)^\top, \qquad
        o_t = \mathrm{scale} \cdot S_t^\top q_t

    with `g = log_decay <= 0`. One step of gradient descent on |Sᵀk - v|²/2 with step size beta: at
    beta = 1 and |k| = 1 the key then recalls v exactly, however often it is written. It erases
    from the state that has already decayed.

    The delta rule (Yang et al. 2024, arXiv 2406.06484) is `log_decay=None`, the gated one (Yang,
    Kautz and Hatamizadeh 2024, arXiv 2412.06464) has both.

    The eigenvalue along k_t is 1 - beta |k_t|², so the state is stable for beta |k|² in [0, 2] and
    grows without bound beyond: **give it keys of norm 1** (`nn.GatedDeltaNet` does) and beta in
    [0, 1], or up to 2 to let eigenvalues be negative.

    Time O(T·(C·(F+H) + F·H)); memory O(T·(C + F·H/C)) while it runs, and between the forward and
    the backward pass nothing but the inputs: chunk states are recomputed.

    Args:
      q: queries `[B,T,N,F]`.
      k: keys `[B,T,K,F]`; K divides N.
      v: values `[B,T,K,H]`.
      log_decay: `[B,T,M]`, all <= 0, `-inf` resets the state; or None for no decay.
      beta: strength of each write, in [0, 2], `[B,T,M]`; or None for 1. M is N, or K where the N/K
        query heads of a group read one state.
      causal: only True; a state that forgets has a direction.
      segment_ids: document of each token `[B,T]`, for packed rows.
      scale: factor of the output. Default: `F ** -0.5`.
      initial_state: `[B,M,F,H]`; it belongs to the first document of each row.
      return_state: also return the state after the last token (of the last document), float32.
      chunk_size: tokens a chunk C, rounded up to a power of two; default 64. Changes speed and
        memory, never the result.
      implementation: "xla" (chunks), "reference" (token by token), or None.

    Returns:
      `[B,T,N,H]`, or that and the final state.

    Raises:
      ValueError: for arguments that do not fit.
    """
    sizes = recurrence.check_arrays(q, k, v, segment_ids, causal=causal)
    scale = checks.resolve_scale(scale, sizes.F)
    chunk = recurrence.chunk_length(chunk_size, sizes.T)
    if beta is None:
        shape = (sizes.B, sizes.T, sizes.K) if log_decay is None else log_decay.shape
        beta = jnp.ones(shape, q.dtype)
    _check_beta(beta, sizes)
    if log_decay is None:
        log_decay = jnp.zeros_like(beta)
    check_log_decay(log_decay, [beta.shape], f"None or shape [B,T,M] = {beta.shape}, as beta")
    run = dispatch.choose("gated_delta_rule", implementation)

    heads, keys, values = recurrence.group_by_state(q, k, v, states=beta.shape[2])
    keys, log_decay = forget_at_documents(keys, log_decay[..., None], segment_ids)
    state = recurrence.start(initial_state, keys, values)
    out, state = run(heads, keys, values, log_decay, beta[..., None], state, chunk=chunk)
    out = recurrence.finish(scale * out, segment_ids, q.dtype)
    return (out, state) if return_state else out


def _check_beta(beta: Array, sizes: checks.Sizes) -> None:
    if beta.shape not in [(sizes.B, sizes.T, heads) for heads in (sizes.N, sizes.K)]:
        expected = (
            f"shape [B,T,M] with B, T = {sizes.B, sizes.T}, M = N = {sizes.N} or K = {sizes.K}"
        )
        raise argument_error("beta", expected, f"shape {beta.shape}")
    if not jnp.issubdtype(beta.dtype, jnp.floating):
        raise argument_error("beta", "a floating-point dtype", beta.dtype)
    if not isinstance(beta, jax.core.Tracer):
        values = np.asarray(beta)
        outside = values[~((values >= 0) & (values <= 2))]
        if outside.size:
            raise argument_error("beta", "values in [0, 2]", str(outside[0]))


def _token_by_token(q, k, v, log_decay, beta, state, *, chunk):
    del chunk

    def step(state, q, k, v, log_decay, beta):
        state = jnp.exp(log_decay)[..., None] * state
        correction = beta * (v - jnp.einsum("bmf,bmfh->bmh", k, state))
        state = state + jnp.einsum("bmf,bmh->bmfh", k, correction)
        return state, jnp.einsum("bmgf,bmfh->bmgh", q, state)

    return recurrence.token_by_token(step, state, q, k, v, log_decay, beta)


def _chunked(q, k, v, log_decay, beta, state, *, chunk):
    r"""All chunks at once, but for the state, which a scan carries from chunk to chunk.

    The corrections u_t of a chunk depend on each other through the keys: a triangular system (the
    WY form). With G the log decay from the start of a chunk, S the state there, b = diag(beta) and
    D_ts = e^{G_t - G_s} for s <= t:

        X = (I + tril(b (K K^T * D), -1))^-1
        U = X b (V - e^G K S)
        O = (Q e^G) S + (Q K^T * D) U
        S' = e^{G_C} S + (K e^{G_C - G})^T U
    """

    @jax.checkpoint  # keep the inputs only; states and scores are recomputed for the gradient
    def attend(q, k, v, log_decay, beta, state):
        log_decay, beta = log_decay.astype(state.dtype), beta.astype(state.dtype)
        q, k, v, log_decay, beta = (cut(x, chunk) for x in (q, k, v, log_decay, beta))
        decay = inside_chunks(log_decay)
        between = jnp.exp(between_tokens(decay))
        solve = inverse(beta * between * einsum("...tf,...sf->...ts", k, k, like=k))
        targets = einsum("...ts,...sh->...th", solve, beta * v, like=v)
        probes = einsum("...ts,...sf->...tf", solve, beta * jnp.exp(decay.before) * k, like=k)
        states, corrections, final = _carry(
            state, jnp.exp(decay.total), targets, probes, k * jnp.exp(decay.after), like=v
        )
        scores = between[..., None, :, :] * einsum("...gtf,...sf->...gts", q, k, like=q)
        out = einsum("...gts,...sh->...gth", scores, corrections, like=v)
        queries = q * jnp.exp(decay.before)[..., None, :, :]
        return out + einsum("...gtf,...fh->...gth", queries, states, like=q), final

    out, final = attend(q, k, v, log_decay, beta, state)
    return paste(out, q.shape[1]), final


def _carry(
    state: Array, decay: Array, targets: Array, probes: Array, keys: Array, *, like: Array
) -> tuple[Array, Array, Array]:
    """The state before each chunk, the corrections in each, and the state after the last."""

    def step(state, chunk):
        decay, targets, probes, keys = chunk
        corrections = targets - einsum("...tf,...fh->...th", probes, state, like=like)
        write = einsum("...tf,...th->...fh", keys, corrections, like=like)
        return decay[..., None] * state + write, (state, corrections)

    final, (states, corrections) = lax.scan(step, state, (decay, targets, probes, keys))
    return states, corrections, final


dispatch.declare(
    "gated_delta_rule",
    {
        "xla": dispatch.Implementation(_chunked),
        "reference": dispatch.Implementation(_token_by_token),
    },
)
