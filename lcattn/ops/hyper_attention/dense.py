"""The definition: one softmax over all T·S pairs, each counted as often as it is estimated to."""

import jax
import jax.numpy as jnp

from lcattn.ops.checks import accumulation_dtype
from lcattn.ops.hyper_attention import draws
from lcattn.ops.hyper_attention.plan import Options
from lcattn.ops.masked_softmax import masked_softmax
from lcattn.typing import Array, Bool, Float, Int


def attend(
    q: Float[Array, "T F"],
    k: Float[Array, "S F"],
    v: Float[Array, "S H"],
    times: Float[Array, "T S"],
    *,
    scale: float,
) -> tuple[Float[Array, "T H"], Float[Array, "T"]]:
    """Attention in which query i counts key j `times_ij` times."""
    dtype = accumulation_dtype(q.dtype)
    scores = scale * jnp.einsum("tf,sf->ts", q, k, preferred_element_type=dtype)
    seen = times > 0
    scores += jnp.log(jnp.where(seen, times, 1)).astype(dtype)
    probabilities, lse = masked_softmax(scores, seen)
    out = jnp.einsum("ts,sh->th", probabilities, v, preferred_element_type=dtype)
    return out.astype(q.dtype), lse


def estimated_times(
    query_ranks: Int[Array, "T"],
    key_ranks: Int[Array, "S"],
    key: Array,
    query_groups: Int[Array, "T"],
    key_groups: Int[Array, "S"],
    draw_ids: Int[Array, "P"],
    options: Options,
) -> Float[Array, "T S"]:
    """How often the queries of one level count each key: 0, once, or S/m a sample."""
    b, m = options.block_size, options.sample_size
    together = (query_groups[:, None] == key_groups) & (query_groups[:, None] < len(draw_ids))
    alike = key_groups[:, None] == key_groups
    size = jnp.sum(alike, axis=1)
    position = jnp.sum(alike & _precedes(key_ranks), axis=0)
    block = position // b
    if options.strict:
        below = jnp.sum(together & (key_ranks < query_ranks[:, None]), axis=1)
        nth = below // b
    else:
        peers = query_groups[:, None] == query_groups
        below = jnp.sum(peers & _precedes(query_ranks), axis=0)
        share = -(-b * jnp.sum(peers, axis=1) // jnp.maximum(jnp.sum(together, axis=1), 1))
        nth = below // share
    last = (jnp.sum(together, axis=1) - 1) // b
    is_own = jnp.minimum(nth, last)[:, None] == block

    def hits(draw_id: Array, size: Array, position: Array) -> Array:
        return jnp.sum(draws.sample(key, draw_id, size, m) == position)

    drawn = jax.vmap(hits)(draw_ids[jnp.minimum(key_groups, len(draw_ids) - 1)], size, position)
    return jnp.where(together, jnp.where(is_own, 1, drawn * (size / m)), 0)


def _precedes(ranks: Int[Array, "T"]) -> Bool[Array, "T T"]:
    """Whether i comes before j in a stable sort."""
    index = jnp.arange(len(ranks))
    return (ranks[:, None] < ranks) | ((ranks[:, None] == ranks) & (index[:, None] < index))
