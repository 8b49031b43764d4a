"""Each chunk of queries against its block of keys and the samples of its group, in O(T) memory.

For one head; callers map it over rows and heads. The backward pass is that of one softmax over
all keys that a query reads: scores are computed again from the saved log-sum-exp, so that neither
scores nor gathered keys are kept. It honours the gradient of the log-sum-exp, through which levels
and leaves are merged.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from lcattn.ops import dispatch
from lcattn.ops.checks import accumulation_dtype
from lcattn.ops.hyper_attention.plan import Options, Plan
from lcattn.typing import Array, Float

# Queries of a head that are worked on at a time; see benchmarks/. A GPU pays for every step of a
# loop.
_ROWS = {"cpu": 512, "gpu": 4096, "tpu": 2048}


def attend(
    q: Float[Array, "T F"],
    k: Float[Array, "S F"],
    v: Float[Array, "S H"],
    plan: Plan,
    options: Options,
) -> tuple[Float[Array, "L T H"], Float[Array, "L T"]]:
    """Outputs and log-sum-exps of each level; 0 and -inf for a query that has no group there."""
    key_blocks, value_blocks = (_take(x, plan.keys) for x in (k, v))
    key_samples, value_samples = (
        x.reshape(-1, x.shape[-1])[plan.samples] for x in (key_blocks, value_blocks)
    )
    chunks = _take(q, plan.queries())
    steps = -(-len(chunks) // max(1, _ROWS[dispatch.default_platform()] // chunks.shape[1]))
    out, lse = _attend(
        options,
        steps,
        chunks,
        (key_blocks, value_blocks),
        (key_samples, value_samples),
        plan,
        plan.key_exists(len(k)),
    )
    out = _take(out.reshape(-1, out.shape[-1]), plan.place)
    return out, lse.reshape(-1).at[plan.place].get(mode="fill", fill_value=-jnp.inf)


def _take(x: Array, index: Array) -> Array:
    """Rows of x; zeros past its end."""
    return x.at[index].get(mode="fill", fill_value=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(options, steps, q, blocks, samples, plan, key_exists):
    return _forward(options, steps, q, blocks, samples, plan, key_exists)[0]


def _forward(options, steps, q, blocks, samples, plan, key_exists):
    dtype = accumulation_dtype(q.dtype)

    def step(_, chunks):
        q, block, group = chunks
        k, v = _gather(blocks, samples, block, group)
        x = _scores(options, q, k, plan, key_exists, block, group)
        highest = jnp.max(x, axis=-1, keepdims=True)
        # Chunks that are left over may see nothing; subtract 0 there, not -inf.
        highest = jnp.where(jnp.isfinite(highest), highest, 0)
        weights = jnp.exp(x - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        safe = jnp.where(total == 0, 1, total)
        out = _product("rcs,rsh->rch", weights.astype(v.dtype), v, dtype) / safe
        return None, (out.astype(v.dtype), (highest + jnp.log(safe))[..., 0])

    _, rows = lax.scan(step, None, _cut(steps, q, plan.block, plan.group))
    out, lse = (x.reshape(-1, *x.shape[2:])[: len(q)] for x in rows)
    return (out, lse), (q, blocks, samples, plan, key_exists, out, lse)


def _backward(options, steps, residuals, cotangents):
    q, blocks, samples, plan, key_exists, out, lse = residuals
    d_out, d_lse = cotangents
    dtype, b = accumulation_dtype(q.dtype), options.block_size
    # d x_ij = p_ij (d_out_i · v_j - d_out_i · out_i + d_lse_i)
    inner = jnp.sum(d_out.astype(dtype) * out.astype(dtype), axis=-1) - d_lse

    def step(sums, chunks):
        q, d_out, lse, inner, block, group = chunks
        k, v = _gather(blocks, samples, block, group)
        x = _scores(options, q, k, plan, key_exists, block, group)
        # At most 0 but for a fused multiply-add of huge scores.
        p = jnp.exp(jnp.minimum(x - lse[..., None], 0))
        dx = p * (_product("rch,rsh->rcs", d_out, v, dtype) - inner[..., None])
        p, dx = p.astype(q.dtype), (options.scale * dx).astype(q.dtype)
        dq = _product("rcs,rsf->rcf", dx, k, dtype)
        new = _product("rcs,rcf->rsf", dx, q, dtype), _product("rcs,rch->rsh", p, d_out, dtype)
        d_blocks, d_samples = sums
        d_blocks = tuple(x.at[block].add(n[:, :b]) for x, n in zip(d_blocks, new, strict=True))
        d_samples = tuple(x.at[group].add(n[:, b:]) for x, n in zip(d_samples, new, strict=True))
        return (d_blocks, d_samples), dq.astype(q.dtype)

    # zeros_like of a product inherits what shard_map knows of q and d_out.
    zero = jnp.zeros_like(q[0, 0, 0] * d_out[0, 0, 0] * lse[0, 0], dtype)
    start = jax.tree.map(lambda x: jnp.zeros_like(x, dtype) + zero, (blocks, samples))
    sums, dq = lax.scan(step, start, _cut(steps, q, d_out, lse, inner, plan.block, plan.group))
    d_blocks, d_samples = jax.tree.map(lambda x: x.astype(q.dtype), sums)
    return dq.reshape(-1, *dq.shape[2:])[: len(q)], d_blocks, d_samples, None, None


def _cut(steps: int, *chunks: Array) -> tuple[Array, ...]:
    """`[C,...] -> [steps,R,...]`; the chunks added have zeros, and read block 0 of group 0."""

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, -len(x) % steps),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(steps, -1, *x.shape[1:])

    return tuple(map(cut, chunks))


def _gather(blocks, samples, block, group) -> tuple[Array, Array]:
    """Keys and values that each chunk reads: `[R,b+m,F]` and `[R,b+m,H]`."""
    k, v = (
        jnp.concatenate([own[block], sampled[group]], axis=1)
        for own, sampled in zip(blocks, samples, strict=True)
    )
    return k, v


def _scores(options, q, k, plan, key_exists, block, group) -> Float[Array, "R c reads"]:
    """With the log of how many keys each one stands for: none, itself alone, or S/m."""
    x = options.scale * _product("rcf,rsf->rcs", q, k, accumulation_dtype(q.dtype))
    own = jnp.where(key_exists[block], 0, -jnp.inf)
    # A sample from the block itself would count twice.
    is_own = plan.samples[group] // options.block_size == block[:, None]
    log_weight = jnp.log(plan.num_keys[group].astype(x.dtype) / options.sample_size)
    sampled = jnp.where(is_own, -jnp.inf, log_weight[:, None])
    return x + jnp.concatenate([own, sampled], axis=1)[:, None].astype(x.dtype)


def _product(spec: str, x: Array, y: Array, dtype) -> Array:
    return jnp.einsum(spec, x, y, preferred_element_type=dtype)


_attend.defvjp(_forward, _backward)
