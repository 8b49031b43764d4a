"""The chunked form: dense attention inside a chunk, the state between chunks.

For a chunk with queries Q, keys K, values V (scale inside Q) and incoming state S:

    O  = tril(p(Q, K)) V + phi(Q) S          S' = S + phi(K)ᵀ V

The backward pass keeps no chunk state. One sweep forward recomputes S and gives dQ; one sweep
backward carries dS and gives dK and dV, which need no S because O is linear in it:

    dQ : from dO Vᵀ and dO Sᵀ                 dS = dS' + phi(Q)ᵀ dO
    dK, dV : from p(Q, K) and dO, and from phi(K), V and dS'

so the memory of a gradient is the inputs and one state. Normalisation and wide feature maps happen
outside (`api`), where autodiff handles them.

Arrays inside are cut into n chunks, `[n, B, K, G, C, F]` for queries and `[n, B, K, C, F]`
for keys, where the G = N/K query heads of a group share a key head. The state is `[B, K, D, H]`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lcattn.ops import checks, dispatch
from lcattn.ops.checks import accumulation_dtype
from lcattn.ops.chunks import cut, einsum, paste
from lcattn.ops.linear_attention.features import Similarity
from lcattn.ops.segments import ChunkMasks, chunk_masks
from lcattn.typing import Array

# Tokens a chunk, and the length up to which one chunk (the quadratic form) is faster still; see
# benchmarks/. A GPU pays for every step of a loop, a CPU for every score.
_CHUNK = {"cpu": 128, "gpu": 256, "tpu": 256}
_QUADRATIC_UP_TO = {"cpu": 256, "gpu": 1024, "tpu": 1024}


def resolve_chunk(chunk_size: int | None, length: int) -> int:
    """The given tokens a chunk, checked, or as many as suit the length and the platform."""
    if chunk_size is not None:
        checks.check_size("chunk_size", chunk_size)
        return chunk_size
    platform = dispatch.default_platform()
    return length if length <= _QUADRATIC_UP_TO[platform] else _CHUNK[platform]


def attend(
    similarity: Similarity,
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    state: Array | None,
    *,
    causal: bool,
    scale: float,
    chunk_size: int,
) -> tuple[Array, Array]:
    """Weighted sums of values `[B,T,N,H]` in float32 (not normalised), and the final state."""
    (B, T, N, F), (S, K) = q.shape, k.shape[1:3]
    chunk = min(chunk_size, S)
    ids = segment_ids
    if ids is None and S % chunk:
        # The tail that fills the last chunk must not be seen: phi(0) is not 0.
        ids = jnp.zeros((B, S), jnp.int32)
    masks = ChunkMasks()
    if ids is not None:
        ids = jnp.pad(ids, ((0, 0), (0, -S % chunk)), constant_values=-1)
        masks = _masks(ids, chunk)
    options = _Options(similarity, scale, inclusive=True)
    q_chunks = cut(q.reshape(B, T, K, N // K, F), min(chunk_size, T))
    k_chunks, v_chunks = cut(k, chunk), cut(v, chunk)
    if state is None:
        state = _zero_state(options, k_chunks[0], v_chunks[0])
    if causal:
        out, final = _scan(options, q_chunks, k_chunks, v_chunks, masks, state)
    elif segment_ids is None:
        final = _sum_over_keys(options, k_chunks, v_chunks, masks, state)
        out = lax.map(lambda q: _read(options, q, final, None), q_chunks)
    else:
        out, final = _scan(options, q_chunks, k_chunks, v_chunks, masks, state)
        out += _later_keys(options, q_chunks, k_chunks, v_chunks, ids, chunk)
    return paste(out, T).reshape(B, T, N, v.shape[-1]), final


def _masks(ids: Array, chunk: int) -> ChunkMasks:
    B, T = ids.shape
    return chunk_masks(ids.reshape(B, T // chunk, chunk).swapaxes(0, 1))


class _Options(NamedTuple):
    """What is fixed while tracing."""

    similarity: Similarity
    scale: float
    inclusive: bool  # whether a token sees itself


def _features(phi, x: Array, scale: float = 1.0) -> Array:
    return phi(x.astype(accumulation_dtype(x.dtype)) * scale)


def _inside(options: _Options, q: Array, k: Array, v: Array, pair: Array | None) -> Array:
    """`tril(p(Q, K)) V`."""
    x = options.scale * einsum("bkgtf,bksf->bkgts", q, k, like=q)
    seen = jnp.tri(q.shape[-2], k=0 if options.inclusive else -1, dtype=bool)
    if pair is not None:
        seen = seen & pair[:, None, None]
    p = jnp.where(seen, options.similarity.score(x), 0)
    return einsum("bkgts,bksh->bkgth", p, v, like=v)


def _read(options: _Options, q: Array, state: Array, read: Array | None) -> Array:
    """`phi(Q) S`."""
    features = _features(options.similarity.query_features, q, options.scale)
    if read is not None:
        features = jnp.where(read[:, None, None, :, None], features, 0)
    return einsum("bkgtd,bkdh->bkgth", features, state, like=q)


def _write(options: _Options, k: Array, v: Array, write: Array | None) -> Array:
    """`phi(K)ᵀ V`."""
    features = _features(options.similarity.key_features, k)
    if write is not None:
        features = jnp.where(write[:, None, :, None], features, 0)
    return einsum("bksd,bksh->bkdh", features, v, like=v)


def _keep(state: Array, keep: Array | None) -> Array:
    return state if keep is None else jnp.where(keep[:, None, None, None], state, 0)


def _zero_state(options: _Options, k: Array, v: Array) -> Array:
    # A product with zero, so that the state varies over a mesh just as k and v do; whose gradient
    # would be one more pass over all of k and v.
    k, v = (lax.stop_gradient(x[..., :1, :]) for x in (k, v))
    return 0 * _write(options, k, v, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(options, q, k, v, masks, state):
    """Causal outputs `[n,B,K,G,C,H]` and the final state."""

    def chunk(state, xs):
        q, k, v, m = xs
        out = _inside(options, q, k, v, m.pair) + _read(options, q, state, m.read)
        return _keep(state, m.keep) + _write(options, k, v, m.write), out

    state, out = lax.scan(chunk, state, (q, k, v, masks))
    return out, state


def _scan_forward(options, q, k, v, masks, state):
    return _scan(options, q, k, v, masks, state), (q, k, v, masks, state)


def _scan_backward(options, residuals, cotangents):
    q, k, v, masks, initial = residuals
    d_out, d_final = cotangents

    def query_gradient(state, xs):
        q, k, v, m, d_out = xs

        def out(q):
            return _inside(options, q, k, v, m.pair) + _read(options, q, state, m.read)

        (dq,) = jax.vjp(out, q)[1](d_out)
        return _keep(state, m.keep) + _write(options, k, v, m.write), dq

    def key_gradient(d_state, xs):
        q, k, v, m, d_out = xs

        def local(k, v):
            return _inside(options, q, k, v, m.pair), _write(options, k, v, m.write)

        dk, dv = jax.vjp(local, k, v)[1]((d_out, d_state))
        read = jax.linear_transpose(lambda s: _read(options, q, s, m.read), d_state)
        return _keep(d_state, m.keep) + read(d_out)[0], (dk, dv)

    _, dq = lax.scan(query_gradient, initial, (q, k, v, masks, d_out))
    d_initial, (dk, dv) = lax.scan(key_gradient, d_final, (q, k, v, masks, d_out), reverse=True)
    return dq, dk, dv, None, d_initial


_scan.defvjp(_scan_forward, _scan_backward)


def _sum_over_keys(options, k, v, masks, state):
    """The initial state plus every key's write."""

    @jax.checkpoint  # features are ten times wider than keys; form them again for the gradient
    def written(k, v, write):
        return _write(options, k, v, write)

    def step(state, xs):
        k, v, m = xs
        return state + written(k, v, m.write), None

    return lax.scan(step, state, (k, v, masks))[0]


def _later_keys(options, q, k, v, ids, chunk):
    """What packed tokens see of later tokens of their document: the same scan from the end."""
    largest = jnp.max(ids, initial=-1)
    flipped = jnp.where(ids < 0, -1, largest - ids)[:, ::-1]
    masks = _masks(flipped, chunk)

    def flip(x):
        return jnp.flip(x, axis=(0, -2))

    state = _zero_state(options, k[0], v[0])
    out, _ = _scan(options._replace(inclusive=False), flip(q), flip(k), flip(v), masks, state)
    return flip(out)
