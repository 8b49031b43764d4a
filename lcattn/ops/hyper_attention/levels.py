"""One softmax from what each level gave, chunk by chunk, and what was not estimated.

As `lcattn.ops.merging.merge`, whose results these are. But outputs of levels are fetched as they
are added up, and gradients for them, of all levels at once, from those of the merged output, which
takes parts as `block_sparse_part` makes them.
"""

import functools

import jax
import jax.numpy as jnp

from lcattn.ops.hyper_attention.rearranged import fetch_back, take
from lcattn.typing import Array, Float, Int
from pallas_kernels.inner import inner

Part = tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]


@jax.custom_vjp
def merge_levels(
    levels: tuple[Float[Array, "B N R H"], Float[Array, "B N R"]],
    exact: Part | None,
    place: Int[Array, "B N L T"],
    readers: Int[Array, "B N R"],
) -> Part:
    """Outputs, in their dtype, and log-sum-exps.

    Args:
      levels: outputs and log-sum-exps of the queries of all chunks.
      exact: those of each token over keys that are not estimated, if there are any.
      place: of each token on each level among the queries; past the end for nowhere.
      readers: which token each query is, as level · T + token; L · T for none.
    """
    return _forward(levels, exact, place, readers)[0]


def _forward(levels, exact, place, readers):
    out, lse = levels
    places = [place[:, :, level] for level in range(place.shape[2])]
    lses = [jnp.where(x < lse.shape[2], take(lse, x), -jnp.inf) for x in places]
    if exact is not None:
        lses.append(_by_token(exact[1]))
    total = jax.nn.logsumexp(jnp.stack(lses), axis=0)
    shares = [_by_token(_share(x, total))[..., None] for x in lses]
    if len(lses) == 1:
        merged = fetch_back(out, places[0])
    else:
        outs = [_by_token(take(out, x)) for x in places]
        if exact is not None:
            outs.append(exact[0])
        parts = (share * x for share, x in zip(shares, outs, strict=True))
        merged = functools.reduce(jnp.add, parts).astype(out.dtype)
    merged = merged, _by_token(total)
    exact_lse = None if exact is None else exact[1]
    return merged, (lse, exact_lse, place, readers, *merged)


def _backward(residuals, gradients):
    lse, exact_lse, place, readers, merged, total = residuals
    g, d_total = gradients
    T = place.shape[-1]
    # d x = p (g · v - along) for the score x of a pair, whatever the level
    products = inner(g, merged, lse.dtype) if g.size else total  # `inner` cuts rows into parts
    along = products - d_total

    def of_part(g, along, total, lse):
        share = _share(lse, total)
        return (share[..., None] * g).astype(merged.dtype), -share * along

    token = jnp.where(readers < place.shape[2] * T, readers % T, T)
    own_g, own_along, own_total = (take(_by_token(x), token) for x in (g, along, total))
    own_total = jnp.where(token < T, own_total, jnp.inf)
    d_levels = of_part(own_g, own_along, own_total, lse)
    d_exact = None if exact_lse is None else of_part(g, along, total, exact_lse)
    return d_levels, d_exact, None, None


def _by_token(x: Float[Array, "B N T *H"]) -> Float[Array, "B T N *H"]:
    """Or by head, what is by token."""
    return jnp.swapaxes(x, 1, 2)


def _share(lse: Array, total: Array) -> Array:
    """Of a part in the whole; 0 where nothing is seen."""
    return jnp.exp(lse - jnp.where(jnp.isneginf(total), 0, total))


merge_levels.defvjp(_forward, _backward)
