"""The public op: arguments, checks, routes, and attention within them."""

import functools
from collections.abc import Callable

from lcattn.errors import argument_error
from lcattn.ops import checks, dispatch, sharding
from lcattn.ops.block_sparse_attention import visible
from lcattn.ops.routing_attention import clusters, lists, members
from lcattn.ops.routing_attention.state import (
    RoutingAttentionState,
    check_state,
    extend,
    routing_attention_state,
    step,
)
from lcattn.ops.softmax_attention import chunked, dense
from lcattn.ops.visibility import Visibility
from lcattn.typing import Array, Float, SegmentIds


@sharding.partitioned
def routing_attention(
    q: Float[Array, "B T N F"],
    v: Float[Array, "B T K H"],
    centroids: Float[Array, "N C F"],
    *,
    cluster_size: int,
    strict: bool | None = None,
    causal: bool = True,
    segment_ids: SegmentIds | None = None,
    scale: float | None = None,
    encode: Callable[[Array], Array] | None = None,
    initial_state: RoutingAttentionState | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], RoutingAttentionState]:
    r"""Softmax attention within clusters of similar tokens (Routing Transformer).

    Layout `[B,T,N,H]`; affinities, scores and sums in float32, output in the dtype of `q`.

    Queries are their own keys, and are put on a sphere, where near means a large inner product:

    .. math::
        x_t = \frac{q_t - \mathrm{mean}(q_t)}{\sqrt{\mathrm{var}(q_t) + 10^{-6}}}, \qquad
        a_{ct} = \mu_c^\top x_t

    with a centroid :math:`\mu_c` for each of C clusters. The clusters decide who sees whom, and
    softmax over scale · x_t·x_s who is heard. No gradient flows through the choice.

    `strict=True`: **causal assignment (ours).** A token belongs to the cluster of the largest
    a_ct, and sees the last w = `cluster_size` tokens of it, itself included. What token t sees is
    settled by tokens up to t, so a stream gives what training gave, in a state of fixed size.

    `strict=False`: **balanced membership (as published).** Cluster c holds the w tokens of the
    largest a_ct, and members see the members before them; a token is in none, one or many
    clusters, and gets the mean of what it hears in each, or zeros::

        affinity    t=0   1   2   3     w=2        as published, the largest of each row
        cluster 0   (.9) .1 (.8) .3                strict: of each column, clusters 0 1 0 1
        cluster 1    .2 (.7) .1 (.6)               (alike here, where clusters are balanced)

    Whether token t is among the w nearest depends on tokens after it. No later *value* is read,
    but which earlier ones are depends on the future: a model trained so is not autoregressive,
    and steps of a stream cannot reproduce it. Use it for `causal=False`, or to compare.

    Time O(T·C·F + T·w·H) and a sort of T tokens, for each cluster as published, once for each head
    if strict: O(T^1.5) at C = T / w = sqrt(T). Memory O(T·H + T·C) in both passes. The strict state
    holds C·(w - 1) keys and values a head, whatever the length; a step reads one cluster of them.

    Source: Roy et al. 2020, "Efficient Content-Based Sparse Attention with Routing Transformers"
    (arXiv 2003.05997). What differs from published code, and why:

    - Causality is decided by true positions. The official code masks by rank in the list, which
      is sound only because its causal models share queries and keys; here they always are shared.
    - The mean over n clusters divides by max(n, 1), not n + 0.01, which shrinks every output.
    - Padding is in no cluster; the official code leaves it out of the counts only.
    - Positions (`encode`) enter after routing. The PyTorch port rotates queries, keys and values
      first: its clusters depend on the position, and its outputs stay rotated. The official code
      learns a bias by distance of ranks within a cluster, which is left out here.
    - Scores are scaled by F^-0.5. The official code has no scale, so that a token's score for
      itself is always F and drowns the others; `scale=1.0` is that.
    - A cluster of more members than a document has tokens holds them all (w = min(w, T)), also
      with more clusters than tokens, so that short documents in a packed row are well defined.

    Args:
      q: queries and keys `[B,T,N,F]`; normalised here.
      v: values `[B,T,K,H]`; K divides N.
      centroids: `[N,C,F]`; used as they are, without a gradient. `nn.RoutingAttention` lets them
        follow the tokens.
      cluster_size: w.
      strict: see above. Default: yes where causal.
      causal: False: members of a cluster see all of its members; not strict.
      segment_ids: document of each token `[B,T]`, for packed rows. As published, each document
        sends its own w tokens to each cluster.
      scale: factor of the scores; default `F ** -0.5`.
      encode: position encoding of normalised queries `[B,T,N,F]`, such as `functools.partial(
        lcattn.ops.rotary, positions=...)`.
      initial_state: continues a stream; from `routing_attention_state`. Needs `strict`.
      return_state: also return the state after the last token. Needs `strict`.
      implementation: "block_sparse" (lists as plans of blocks, in the best form of
        `block_sparse_attention`), "xla" (blocks), "reference" (all scores of a list at once), or
        None: a plan from 4096 tokens on where kernels for Hopper GPUs run it, if strict and without
        a state; else "xla".

    Returns:
      `[B,T,N,H]`, or that and the final state.

    Raises:
      ValueError: for arguments that do not fit.
    """
    sizes = checks.check_heads(q, None, v, segment_ids)
    if centroids.ndim != 3 or 0 in centroids.shape:
        raise argument_error("centroids", "3 axes [N,C,F], none empty", f"shape {centroids.shape}")
    num_clusters = centroids.shape[1]
    checks.check_shape("centroids", centroids, (sizes.N, num_clusters, sizes.F), "[N,C,F]")
    checks.check_size("cluster_size", cluster_size)
    scale = checks.resolve_scale(scale, sizes.F)
    strict = causal if strict is None else strict
    is_streamed = initial_state is not None or return_state
    if strict and not causal:
        raise argument_error("strict", "False where causal is False", strict)
    if is_streamed and not strict:
        raise argument_error("strict", "True with a state", strict)
    if is_streamed and segment_ids is not None:
        raise argument_error("segment_ids", "None with a state", "both")
    is_one_list = strict and not is_streamed
    attend = dispatch.choose(
        "routing_attention", implementation,
        sizes=sizes, dtype=q.dtype, is_one_list=is_one_list,
    )  # fmt: skip
    if is_one_list:
        # In a list of all tokens, cluster after cluster.
        attend = functools.partial(attend, window=cluster_size)

    x = clusters.normalize(q)
    affinity = clusters.affinities(x, centroids)
    x = x.astype(q.dtype)
    if encode is not None:
        x = encode(x)
    if not is_streamed:
        routes = (
            members.recent_members(clusters.nearest(affinity), segment_ids, size=cluster_size)
            if strict
            else members.top_members(affinity, segment_ids, size=cluster_size, causal=causal)
        )
        return lists.attend_within(x, v, routes, scale=scale, attend=attend)
    if initial_state is None:
        initial_state = routing_attention_state(
            sizes.B, sizes.N, num_clusters, cluster_size, sizes.F, sizes.H, dtype=q.dtype
        )
    check_state(initial_state, sizes, num_clusters=num_clusters, cluster_size=cluster_size)
    new = (step if sizes.T == 1 else extend)(initial_state, x, v, clusters.nearest(affinity))
    out = attend(lists.gather(x, new.index), new.k, new.v, new.seen, scale)
    out = lists.scatter(out, new.index, sizes.T).astype(q.dtype)
    return (out, new.state) if return_state else out


def _blocks(q: Array, k: Array, v: Array, seen: Visibility, scale: float, **rest) -> Array:
    del rest
    out, _ = chunked.attend(q, k, v, seen, scale=scale)
    return out


def _block_sparse(
    q: Array, k: Array, v: Array, seen: Visibility, scale: float, window: int | None = None
) -> Array:
    out, _ = visible.attend(q, k, v, seen, scale=scale, window=window)
    return out


def _plan_pays(*, is_one_list: bool, **call) -> bool:
    """Whether a plan is the better choice; of a list for each cluster, none was timed."""
    return is_one_list and visible.pays(**call)


def _reference(q: Array, k: Array, v: Array, seen: Visibility, scale: float, **rest) -> Array:
    del rest
    out, _ = dense.reference(q, k, v, visibility=seen, alibi=None, scale=scale)
    return out


dispatch.declare(
    "routing_attention",
    {
        "block_sparse": dispatch.Implementation(_block_sparse, pays=_plan_pays),
        "xla": dispatch.Implementation(_blocks),
        "reference": dispatch.Implementation(_reference),
    },
)
