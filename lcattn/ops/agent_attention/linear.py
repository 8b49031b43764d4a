"""Agent attention as linear attention whose feature maps are softmaxes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lcattn.ops.agent_attention.state import AgentAttentionState
from lcattn.ops.gated_linear_attention import gated_linear_attention
from lcattn.ops.linear_attention import linear_attention
from lcattn.ops.segments import document_bounds, owners
from lcattn.typing import Array, Float, SegmentIds

# The score of nothing. Finite, since differences of scores are formed, all of which are far above.
_NOTHING = -1e30


class _Normalizer(NamedTuple):
    """The sum of exp(score), as `exp(highest) * total`: exact however large the scores."""

    highest: Array
    total: Array

    def plus(self, other: "_Normalizer") -> "_Normalizer":
        highest = jnp.maximum(self.highest, other.highest)
        kept, added = (x.total * jnp.exp(x.highest - highest) for x in (self, other))
        return _Normalizer(highest, kept + added)

    def log_over(self, other: "_Normalizer") -> Array:
        """The log of the quotient."""
        return (self.highest - other.highest) + (jnp.log(self.total) - jnp.log(other.total))


def attend(
    shares: Float[Array, "B T N n"],
    x: Float[Array, "B S N n"],
    v: Float[Array, "B S N H"],
    segment_ids: SegmentIds | None,
    state: AgentAttentionState | None,
    *,
    causal: bool,
    chunk_size: int | None,
) -> tuple[Array, AgentAttentionState | None]:
    """From the queries' weights of the agents and the agents' scores of the keys."""
    if segment_ids is not None:
        x = jnp.where((segment_ids >= 0)[..., None, None], x, _NOTHING)
    if causal:
        return _causal(shares, x, v, segment_ids, state, chunk_size)
    weights = jnp.exp(x - _document_lse(x, segment_ids))
    out = linear_attention(
        shares.astype(v.dtype), weights.astype(v.dtype), v,
        causal=False, segment_ids=segment_ids, scale=1.0, feature_map="identity",
        normalize=False, chunk_size=chunk_size,
    )  # fmt: skip
    assert not isinstance(out, tuple)
    return out, None


def _causal(shares, x, v, segment_ids, state, chunk_size):
    start = _Normalizer(jnp.full_like(x[:, 0], _NOTHING), jnp.ones_like(x[:, 0]))
    if state is not None:
        read = state.total > 0
        start = _Normalizer(
            jnp.where(read, state.highest, start.highest), jnp.where(read, state.total, 1)
        )
    upto = _running(x, start, segment_ids)
    before = jax.tree.map(lambda s, x: jnp.concatenate([s[:, None], x[:, :-1]], 1), start, upto)
    out, values = gated_linear_attention(
        shares.astype(v.dtype), (jnp.exp(x - upto.highest) / upto.total).astype(v.dtype), v,
        jnp.minimum(before.log_over(upto), 0),  # above 0 by rounding only
        segment_ids=segment_ids, scale=1.0, chunk_size=chunk_size,
        initial_state=None if state is None else state.values, return_state=True,
    )  # fmt: skip
    last = jax.tree.map(lambda x: x[:, -1], upto)
    read = last.highest > _NOTHING
    return out, AgentAttentionState(
        values, jnp.where(read, last.highest, -jnp.inf), jnp.where(read, last.total, 0)
    )


def _running(x: Array, start: _Normalizer, segment_ids: SegmentIds | None) -> _Normalizer:
    """Over the keys of a document up to each one; `start` belongs to the row's first document."""
    highest = lax.stop_gradient(x)
    each = _Normalizer(highest, jnp.exp(x - highest))  # 1, with the gradient of x
    first = start.plus(jax.tree.map(lambda x: x[:, 0], each))
    if segment_ids is None:
        each = jax.tree.map(lambda x, first: x.at[:, 0].set(first), each, first)
        return lax.associative_scan(_Normalizer.plus, each, axis=1)
    before, after = owners(segment_ids.T[:, :, None])
    is_new = (before != after).T[..., None, None]
    each = jax.tree.map(
        lambda x, first: x.at[:, 0].set(jnp.where(is_new[:, 0], x[:, 0], first)), each, first
    )

    def combine(left, right):
        (was_new, earlier), (is_new, later) = left, right
        both = jax.tree.map(
            lambda later, sum: jnp.where(is_new, later, sum), later, earlier.plus(later)
        )
        return was_new | is_new, both

    return lax.associative_scan(combine, (is_new, each), axis=1)[1]


def _document_lse(x: Array, segment_ids: SegmentIds | None) -> Array:
    """Log-sum-exp over all keys of each key's document."""
    if segment_ids is None:
        return jax.nn.logsumexp(x, axis=1, keepdims=True)
    first, _ = document_bounds(segment_ids)  # a number below T for each document

    def row(x, document):
        highest = lax.stop_gradient(jax.ops.segment_max(x, document, num_segments=len(x)))
        total = jax.ops.segment_sum(jnp.exp(x - highest[document]), document, num_segments=len(x))
        return (highest + jnp.log(jnp.where(total == 0, 1, total)))[document]

    return jax.vmap(row)(x, first)
