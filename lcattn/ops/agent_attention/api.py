"""The public op: arguments, checks, and both softmaxes' logits."""

import jax
import jax.numpy as jnp

from lcattn.errors import argument_error
from lcattn.ops import checks, dispatch, sharding
from lcattn.ops.agent_attention import dense, linear
from lcattn.ops.agent_attention.state import AgentAttentionState
from lcattn.ops.checks import Sizes
from lcattn.typing import Array, Float, SegmentIds

dispatch.declare(
    "agent_attention",
    {
        "xla": dispatch.Implementation(linear.attend),
        "reference": dispatch.Implementation(dense.reference),
    },
)


@sharding.partitioned
def agent_attention(
    q: Float[Array, "B T N F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K H"],
    agents: Float[Array, "*b n N F"],
    *,
    causal: bool = True,
    segment_ids: SegmentIds | None = None,
    scale: float | None = None,
    key_bias: Float[Array, "*c N n S"] | None = None,
    query_bias: Float[Array, "*d N T n"] | None = None,
    initial_state: AgentAttentionState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], AgentAttentionState]:
    r"""Attention through n agent tokens, in time linear in the length.

    Layout `[B,T,N,H]`; scores, sums and state in float32, output in the dtype of `q`.

    .. math::
        \bar v_{ta} = \sum_{s \in V(t)} \mathrm{softmax}_s(x_{as})\, v_s, \quad
        x_{as} = \mathrm{scale} \cdot A_a^\top k_s + b_{as}; \qquad
        o_t = \sum_a \mathrm{softmax}_a(\mathrm{scale} \cdot q_t^\top A_a + b'_{ta})\, \bar v_{ta}

    The agents read the keys that t may see, and the query reads the agents. So it is linear
    attention with two softmaxes for feature maps, and runs as one: with `causal=False`
    as `linear_attention`; with `causal=True` as `gated_linear_attention`, where an agent forgets
    at the rate at which its softmax is diluted: with L_t the log of its normaliser up to t,

    .. math::
        \bar v_t = e^{L_{t-1} - L_t}\, \bar v_{t-1} + e^{x_t - L_t}\, v_t

    in which no exponent is positive, however large the scores. Weights of a row sum to 1, and the
    map of a head has rank n at most. Time O(T·n·(F+H)), or with the chunks C of the causal form
    O(T·(C·(n+H) + n·H)); memory O(T·n). The state has n (H+2) numbers a head.

    Source: Han et al. 2023, "Agent Attention: On the Integration of Softmax and Linear Attention"
    (arXiv 2312.08874), for images: non-causal, agents pooled from the queries (`pooled_agents`).
    The causal form is ours; the paper has none. It takes agents that are parameters (or that come
    from elsewhere, such as another modality). Pooled from the sequence itself they leak its future
    into every row, even where the sums over keys are causal.

    Args:
      q: queries `[B,T,N,F]`.
      k: keys `[B,S,K,F]`; K divides N.
      v: values `[B,S,K,H]`.
      agents: `[n,N,F]`, or `[B,n,N,F]` for agents of each row.
      causal: agents as read by query t have seen keys 0..t, and T = S. Otherwise all keys.
      segment_ids: document of each token `[B,T]`, for packed rows.
      scale: factor of both products; default `F ** -0.5`.
      key_bias: added to the agents' scores, `[N,n,S]` or `[B,N,n,S]`.
      query_bias: added to the queries' scores, `[N,T,n]` or `[B,N,T,n]`.
      initial_state: the state to start from; it belongs to the first document of each row.
      return_state: also return the state after the last token (of the last document).
      chunk_size: tokens a chunk of the linear form. Changes speed and memory, never the result.
      implementation: "xla" (linear), "reference" (T·S·n scores), or None.

    Returns:
      `[B,T,N,H]`, or that and the final state.

    Raises:
      ValueError: for arguments that do not fit.
    """
    sizes = checks.check_heads(q, k, v, segment_ids)
    scale = checks.resolve_scale(scale, sizes.F)
    if causal and sizes.T != sizes.S:
        raise argument_error("q", f"T={sizes.S} queries, as many as keys, when causal", sizes.T)
    if not causal and (return_state or initial_state is not None):
        raise argument_error("causal", "True with a state, which knows the past only", causal)
    agents = _check_agents(agents, sizes, q.dtype)
    n = agents.shape[1]
    key_bias = _check_bias("key_bias", key_bias, sizes.B, (sizes.N, n, sizes.S), "[N,n,S]")
    query_bias = _check_bias("query_bias", query_bias, sizes.B, (sizes.N, sizes.T, n), "[N,T,n]")

    dtype = checks.accumulation_dtype(q.dtype)
    keys = jnp.repeat(k, sizes.groups, axis=2)
    x = scale * jnp.einsum("bsnf,banf->bsna", keys, agents, preferred_element_type=dtype)
    y = scale * jnp.einsum("btnf,banf->btna", q, agents, preferred_element_type=dtype)
    if key_bias is not None:
        x += key_bias.astype(dtype).transpose(0, 3, 1, 2)
    if query_bias is not None:
        y += query_bias.astype(dtype).transpose(0, 2, 1, 3)

    run = dispatch.choose("agent_attention", implementation)
    out, state = run(
        jax.nn.softmax(y, axis=-1), x, jnp.repeat(v, sizes.groups, axis=2), segment_ids,
        _check_state(initial_state, sizes, n, dtype), causal=causal, chunk_size=chunk_size,
    )  # fmt: skip
    return (out.astype(q.dtype), state) if return_state else out.astype(q.dtype)


def _check_agents(agents: Array, sizes: Sizes, dtype) -> Float[Array, "b n N F"]:
    if agents.ndim not in (3, 4) or agents.shape[-2:] != (sizes.N, sizes.F) or 0 in agents.shape:
        axes = f"[n,N,F] or [B,n,N,F] with N={sizes.N}, F={sizes.F}"
        raise argument_error("agents", f"shape {axes}", f"{agents.shape}")
    if agents.dtype != dtype:
        raise argument_error("agents", f"the dtype of q, {dtype}", agents.dtype)
    if agents.ndim == 4 and agents.shape[0] != sizes.B:
        raise argument_error("agents", f"B={sizes.B} as in q", f"shape {agents.shape}")
    return jnp.broadcast_to(agents, (sizes.B, *agents.shape[-3:]))


def _check_bias(name: str, bias: Array | None, batch: int, shape: tuple[int, ...], axes: str):
    if bias is None:
        return None
    if bias.shape not in (shape, (batch, *shape)):
        raise argument_error(name, f"shape {axes} = {shape}, or with B first", f"{bias.shape}")
    return jnp.broadcast_to(bias, (batch, *shape)) if bias.ndim == 4 else bias[None]


def _check_state(
    state: AgentAttentionState | None, sizes: Sizes, num_agents: int, dtype
) -> AgentAttentionState | None:
    if state is None:
        return None
    shape = (sizes.B, sizes.N, num_agents)
    checks.check_shape("initial_state.values", state.values, (*shape, sizes.H), "[B,N,n,H]")
    checks.check_shape("initial_state.highest", state.highest, shape, "[B,N,n]")
    checks.check_shape("initial_state.total", state.total, shape, "[B,N,n]")
    return jax.tree.map(lambda x: x.astype(dtype), state)
