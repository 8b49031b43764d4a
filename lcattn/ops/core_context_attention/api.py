"""The public op: arguments, checks, groups, and one softmax over cores and tokens."""

import jax.numpy as jnp

from lcattn.errors import argument_error
from lcattn.ops import checks, dispatch, sharding
from lcattn.ops.block_sparse_attention import visible
from lcattn.ops.core_context_attention import groups
from lcattn.ops.core_context_attention.groups import Cores, Views
from lcattn.ops.core_context_attention.state import CoreContextState, check_state, extend
from lcattn.ops.merging import merge
from lcattn.ops.softmax_attention import chunked, dense
from lcattn.ops.visibility import Visibility
from lcattn.typing import Array, Float, SegmentIds


@sharding.partitioned
def core_context_attention(
    q: Float[Array, "B T N F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = True,
    segment_ids: SegmentIds | None = None,
    scale: float | None = None,
    group_size: int = 16,
    window: int = 1024,
    share_cores: bool = False,
    initial_state: CoreContextState | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], CoreContextState]:
    r"""Attention to recent tokens one by one, and to far ones by groups (CCA).

    Layout `[B,T,N,H]`; scores and sums in float32, output in the dtype of `q`.

    Group c holds g = `group_size` consecutive tokens of a document. The query of its last token
    scores them, and their weighted means are the group's core:

    .. math::
        p_c = \mathrm{softmax}_{l \in c}(\mathrm{scale} \cdot q_{\mathrm{last}(c)}^\top k_l), \qquad
        \bar k_c = \sum_l p_{cl} k_l, \quad \bar v_c = \sum_l p_{cl} v_l

    Token t (counted from 0) reads the j = max(0, (t + 1 - window) // g) first groups as cores and
    the tokens from j·g to t as they are, in one softmax over both::

        window=3, g=2   key  0 1 2 3 4 5      core 0 1 2
        query 3              x x x x . .           . . .
        query 4              . . x x x .           x . .
        query 5              . . x x x x           x . .
        query 6              . . . . x x ...       x x .

    so that every past token counts exactly once, and the newest token in a core that t sees is
    `window` tokens back. There are no parameters: a trained softmax layer can be converted, and
    with g = 1 or `window` >= T this is softmax attention.

    Time O(T·(T/g + window)): T² with a constant of 1/g. Memory O(T) in both passes. A stream keeps
    a core for each group and window + g - 2 tokens; group and window may change after training.

    Source: Chen et al. 2024, "Core Context Aware Transformers for Long Context Language Modeling"
    (arXiv 2412.12465). What differs from published code, and why:

    - The Triton kernel takes window + (t mod g) local tokens, the Python mask window +
      ((t - window) mod g); they agree only if g divides the window, and otherwise count tokens
      twice or never. The paper's equation counts one token twice. Here core and local tokens
      partition the past for any g and window.
    - The kernel divides negative numbers towards zero, which shows core 0 up to g - 1 tokens too
      early and, where window < g - 1, the future with it.
    - Training in the Qwen code rounds the number of groups down to a multiple of 64, so that the
      masks of training and inference differ. Here they are one function.
    - Decoding in the published code pools late, and so caches queries; pools the first group over
      and over; and miscounts a second prompt chunk. Here a group is pooled when its last token
      comes, by the query that is then at hand.
    - Groups restart with each document, and padding is in none.

    Args:
      q: queries `[B,T,N,F]`, of the same tokens as the keys: T = S.
      k: keys `[B,S,K,F]`; K divides N. Rotate q and k before (as published): a core is then a mean
        of keys at g positions.
      v: values `[B,S,K,H]`.
      causal: only True; cores are of the past.
      segment_ids: document of each token `[B,T]`, for packed rows.
      scale: factor of the scores, also in pooling; default `F ** -0.5`.
      group_size: tokens a group.
      window: tokens between a query and the newest core it sees, its own included.
      share_cores: one core for the query heads that share a key head, scored by their mean query.
        Ours: as published, each query head has cores of its own, so that grouped queries save
        little (32 query and 8 key heads at 128k keep 26% of the cache; sharing, 7%).
      initial_state: continues a stream; from `core_context_attention_state`.
      return_state: also return the state after the last token. Needs `initial_state`, which says
        how long the stream may become. Past that, outputs are NaN under `jit`.
      implementation: "block_sparse" (cores and tokens as one plan of blocks, in the best form of
        `block_sparse_attention`; tokens' keys are copied for query heads that have cores of their
        own), "xla" (blocks), "reference" (one softmax over T·(T/g + T) scores), or None: a plan
        from 4096 tokens on where kernels for Hopper GPUs run it, else "xla".

    Returns:
      `[B,T,N,H]`, or that and the final state.

    Raises:
      ValueError: for arguments that do not fit.
    """
    sizes = checks.check_heads(q, k, v, segment_ids)
    scale = checks.resolve_scale(scale, sizes.F)
    checks.check_size("group_size", group_size)
    checks.check_size("window", window)
    if not causal:
        raise argument_error("causal", "True: cores stand for the past", causal)
    if sizes.T != sizes.S:
        raise argument_error("q", f"T={sizes.S} queries, as many as keys", sizes.T)
    if return_state and initial_state is None:
        raise argument_error("initial_state", "a state to continue with return_state", None)
    run = dispatch.choose("core_context_attention", implementation, sizes=sizes, dtype=q.dtype)

    if initial_state is None:
        cores, seen = _groups_of(q, k, v, segment_ids, group_size, window, scale, share_cores)
        # Padding may lie between the tokens that a query sees.
        most_tokens = window + group_size - 1 if segment_ids is None else None
        return run(q, k, v, cores, seen, scale, most_tokens)
    if segment_ids is not None:
        raise argument_error("segment_ids", "None with an initial_state", "both")
    check_state(initial_state, sizes, group_size=group_size, window=window, share_cores=share_cores)
    k, v, seen, state = extend(
        initial_state, q, k, v,
        group_size=group_size, window=window, scale=scale, share_cores=share_cores,
    )  # fmt: skip
    cores = Cores(*(x.astype(q.dtype) for x in state.cores))
    out = run(q, k, v, cores, seen, scale, window + group_size - 1)
    out = jnp.where(state.length > state.max_length, jnp.nan, out)
    return (out, state) if return_state else out


def _groups_of(
    q: Array, k: Array, v: Array, segment_ids: Array | None, g: int, window: int, scale: float,
    share_cores: bool,
) -> tuple[Cores, Views]:  # fmt: skip
    T, count = q.shape[1], q.shape[1] // g
    if segment_ids is not None:
        packed = groups.packed_groups(segment_ids, g, window)
        queries = groups.take(q, packed.members[..., -1])
        keys, values = (groups.take(x, packed.members) for x in (k, v))
        seen = packed.views
    else:
        queries = q[:, g - 1 : count * g : g]
        keys, values = (
            x[:, : count * g].reshape(x.shape[0], count, g, *x.shape[2:]) for x in (k, v)
        )
        positions = jnp.arange(T, dtype=jnp.int32)[None]
        seen = groups.views(
            positions, positions, positions[:, g - 1 : count * g : g], group_size=g, window=window
        )
    return groups.pool(queries, keys, values, scale=scale, share_cores=share_cores), seen


def _merged(
    q: Array, k: Array, v: Array, cores: Cores, seen: Views, scale: float, most_tokens: int | None
) -> Array:
    """Cores and tokens apart, since they may differ in heads, and merged to one softmax."""
    del most_tokens
    parts = [chunked.attend(q, k, v, seen.tokens, scale=scale)]
    if cores.k.shape[1]:
        parts.append(chunked.attend(q, *cores, seen.cores, scale=scale))
    out, _ = merge(*parts)
    return out.astype(q.dtype)


def _block_sparse(
    q: Array, k: Array, v: Array, cores: Cores, seen: Views, scale: float, most_tokens: int | None
) -> Array:
    """Cores and tokens side by side in one plan."""
    heads = cores.k.shape[2]
    out, _ = visible.attend(
        q, _side_by_side(cores.k, k, heads), _side_by_side(cores.v, v, heads), _all_seen(seen),
        scale=scale, window=most_tokens, sinks=cores.k.shape[1],
    )  # fmt: skip
    return out


def _reference(
    q: Array, k: Array, v: Array, cores: Cores, seen: Views, scale: float, most_tokens: int | None
) -> Array:
    """The softmax over cores and tokens side by side."""
    del most_tokens
    heads = q.shape[2]
    out, _ = dense.reference(
        q, _side_by_side(cores.k, k, heads), _side_by_side(cores.v, v, heads),
        visibility=_all_seen(seen), alibi=None, scale=scale,
    )  # fmt: skip
    return out


def _side_by_side(core: Array, token: Array, heads: int) -> Array:
    core, token = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (core, token))
    return jnp.concatenate([core, token], axis=1)


def _all_seen(seen: Views) -> Visibility:
    edges = (
        jnp.concatenate([core, token], axis=1)
        for core, token in zip(seen.cores[1:], seen.tokens[1:], strict=True)
    )
    return Visibility(seen.tokens.queries, *edges)


dispatch.declare(
    "core_context_attention",
    {
        "block_sparse": dispatch.Implementation(_block_sparse, pays=visible.pays),
        "xla": dispatch.Implementation(_merged),
        "reference": dispatch.Implementation(_reference),
    },
)
