r"""What XLA does for every chunk by itself, where there is no kernel: to read, and gradients.

Layers of any size; of each the arrays that a walk leaves, W, S and E of every chunk one upon
another, `[B,M,n,in+in+64,out]`. The formulas are those of `gpu_read` and `gpu_tokens`.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.neural_memory.gpu_gates import Views, unpair
from pallas_kernels.neural_memory.gpu_plan import Plan
from pallas_kernels.tiles import TILE

_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def read(
    plan: Plan, q: jax.Array, views: Views, inputs: Sequence[jax.Array], kept: Sequence[jax.Array]
) -> jax.Array:
    """Answers `[B,T,N,H]`.

    Args:
      plan: options.
      q: queries `[B,T,N,H]`.
      views: as for `gpu_read.read`.
      inputs: of each layer, the keys' `[B,M,n,64,in]`.
      kept: of each layer, W, S and E.
    """
    (B, _, N, H), M = q.shape, views.kept.shape[1]
    b, f = (x[:, :, :, None, :, None] for x in (views.kept, views.carried))
    written = unpair(views.written)[:, :, : b.shape[2], None]
    x = q.reshape(B, -1, TILE, M, N // M, H).transpose(0, 3, 1, 4, 2, 5)
    for layer, (key, stacked) in enumerate(zip(inputs, kept, strict=True)):
        if layer:
            x = plan.activate(x)[0].astype(q.dtype)
        scores = -written * _einsum("...gtf,...sf->...gts", x, key)
        x = jnp.concatenate([part.astype(q.dtype) for part in (b * x, f * x, scores)], axis=-1)
        x = _einsum("...gtf,...fh->...gth", x, stacked)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(q.shape).astype(q.dtype)


def token_gradients(
    shares: jax.Array,
    inputs: Sequence[jax.Array],
    kept: Sequence[jax.Array],
    pulled: Sequence[jax.Array],
    d_first: jax.Array,
    d_outputs: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of keys and values `[B,T,M,H]` and of shares `[B,M,n,5,64]`.

    Args:
      shares: as for `gpu_walk.walk`.
      inputs: as for `read`.
      kept: as for `read`.
      pulled: of each layer, gradients of W and S after every chunk one upon another.
      d_first: gradient of the outputs of the first layer, `[B,M,n,64,out]`.
      d_outputs: of the last.
    """
    d_shares, pulled_back = jnp.zeros_like(shares), []
    for key, stacked, gradients in zip(inputs, kept, pulled, strict=True):
        size = key.shape[-1]
        w, s, e = jnp.split(stacked, (size, 2 * size), axis=-2)
        a, b = jnp.split(gradients, 2, axis=-2)
        through = [_einsum("...th,...fh->...tf", e, x) for x in (a, b)]
        pulled_back.append(sum(shares[..., i, :, None] * x for i, x in enumerate(through)))
        # What came in is scaled by one number, which stands in all of a row.
        sums = (
            jnp.sum(x.astype(jnp.float32) * y, axis=(-2, -1)) for x, y in ((a, w), (a, s), (b, s))
        )
        rows = [-jnp.sum(key * x, axis=-1) for x in through]
        rows += [jnp.broadcast_to(x[..., None] / TILE, rows[0].shape) for x in sums]
        d_shares += jnp.stack(rows, axis=-2)
    first = kept[0][..., : inputs[0].shape[-1], :]
    d_keys = _einsum("...th,...fh->...tf", d_first, first) - pulled_back[0]
    return by_token(d_keys.astype(d_outputs.dtype)), by_token(-d_outputs), d_shares


def by_chunk(x: jax.Array) -> jax.Array:
    """`[B,T,M,H] -> [B,M,n,64,H]`."""
    return x.reshape(x.shape[0], -1, TILE, *x.shape[2:]).transpose(0, 3, 1, 2, 4)


def by_token(x: jax.Array) -> jax.Array:
    """Undoes `by_chunk`."""
    x = x.transpose(0, 2, 3, 1, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
