"""Softmax attention beyond the shared suite: caches, merging, long sequences, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import ops

from lcattn.ops import softmax_attention
from lcattn.ops.softmax_attention import cudnn
from lcattn.testing.conformance.compare import assert_close

B, T, N, K, H = 2, 21, 4, 2, 8


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture
def qkv():
    return draw(0, B, T, N, H), draw(1, B, T, K, H), draw(2, B, T, K, H)


def test_a_window_of_at_least_the_length_changes_nothing(qkv):
    expected = ops.softmax_attention(*qkv)
    for window in (T, T + 1, 10 * T):
        assert_close("output", ops.softmax_attention(*qkv, window=window), expected, 1e-6)


def test_a_window_of_one_gives_the_own_value(qkv):
    out = ops.softmax_attention(*qkv, window=1)
    assert_close("output", out, jnp.repeat(qkv[2], N // K, axis=2), 1e-6)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_queries_at_the_end_of_a_half_filled_cache(qkv, implementation):
    q, k, v = qkv
    expected = ops.softmax_attention(q, k, v, window=6)
    cached = [jnp.concatenate([x, jnp.full_like(x, jnp.inf)], axis=1) for x in (k, v)]
    cached = [jnp.nan_to_num(x, posinf=1e3) for x in cached]  # slots not yet written
    run = jax.jit(functools.partial(ops.softmax_attention, implementation=implementation, window=6))
    out = run(q[:, 10:13], *cached, query_position=10)
    assert_close("output", out, expected[:, 10:13], 1e-6)
    # A ring whose newest key is last: slots before position 0 do not exist.
    ring = [jnp.concatenate([jnp.full_like(x[:, :5], 1e3), x[:, :3]], axis=1) for x in (k, v)]
    out = run(q[:, :3], *ring, query_position=0, key_position=-5)
    assert_close("output", out, expected[:, :3], 1e-6)


def test_parts_of_the_keys_merge_by_their_log_sum_exp(qkv):
    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def merged(q, k, v):
        parts = [
            ops.softmax_attention(q, k[:, s], v[:, s], causal=False, return_lse=True)
            for s in (slice(8), slice(8, None))
        ]
        outs, lses = (jnp.stack(x) for x in zip(*parts, strict=True))
        out = jnp.sum(jax.nn.softmax(lses, axis=0)[..., None] * outs, axis=0)
        return jnp.sum(out**2), out

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def whole(q, k, v):
        out = ops.softmax_attention(q, k, v, causal=False, implementation="reference")
        return jnp.sum(out**2), out

    found, expected = merged(*qkv), whole(*qkv)
    assert_close("output", found[0][1], expected[0][1], 1e-6)
    assert_close("gradient of ", found[1], expected[1], 1e-5)


def test_beyond_the_materialised_length_blocks_give_the_same():
    length = 1100
    q, k, v = (draw(i, 1, length, 1, 4) for i in range(3))
    ids = jnp.sort(jnp.asarray(np.random.default_rng(3).integers(0, 3, (1, length)), jnp.int32))

    def gradients(implementation):
        def loss(q, k, v):
            out = ops.softmax_attention(
                q, k, v, window=300, segment_ids=ids, implementation=implementation
            )
            return jnp.sum(jnp.sin(out))

        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    assert_close("gradient of ", gradients("xla"), gradients("reference"), 1e-5)


@pytest.mark.parametrize("window", [None, 300])
def test_queries_amid_a_long_cache_across_a_block_boundary(window):
    q, k, v = draw(0, 1, 100, 1, 4), draw(1, 1, 1100, 1, 4), draw(2, 1, 1100, 1, 4)
    run = jax.jit(
        functools.partial(ops.softmax_attention, window=window), static_argnames="implementation"
    )
    found, expected = (
        run(q, k, v, query_position=450, implementation=name) for name in ("xla", "reference")
    )
    assert_close("output", found, expected, 1e-6)


def test_one_query_against_a_long_cache_in_one_piece():
    q, k, v = draw(0, 1, 1, 4, 8), draw(1, 1, 1100, 2, 8), draw(2, 1, 1100, 2, 8)
    run = jax.jit(
        functools.partial(ops.softmax_attention, window=300), static_argnames="implementation"
    )
    found, expected = (
        run(q, k, v, query_position=450, implementation=name) for name in ("xla", "reference")
    )
    assert_close("output", found, expected, 1e-6)


@pytest.fixture
def asked(monkeypatch):
    """As on a GPU, but JAX answers without cuDNN; what was asked of it."""
    attend, names = jax.nn.dot_product_attention, []

    def answer(*args, implementation=None, **options):
        names.append(implementation)
        return attend(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    monkeypatch.setattr(cudnn.dispatch, "default_platform", lambda: "gpu")
    return names


def test_cudnn_decodes_from_a_half_filled_cache(asked):
    shapes = (2, 1, 4, 8), (2, 24, 2, 8), (2, 24, 2, 8)
    q, k, v = (draw(i, *shape).astype(jnp.bfloat16) for i, shape in enumerate(shapes))

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(implementation, position):
        def loss(q, k, v):
            out = softmax_attention(q, k, v, query_position=position, implementation=implementation)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

        return jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

    value_and_gradients(None, 0)
    assert asked == ["cudnn"]
    for position in (-1, 0, 17):
        found, expected = (value_and_gradients(name, position) for name in (None, "reference"))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (a, b)), atol=2e-2)
    with pytest.raises(ValueError, match="'cudnn' decodes from a cache that begins with the first"):
        softmax_attention(q, k, v, query_position=17, window=5, implementation="cudnn")


def test_memory_of_a_gradient_grows_with_the_length():
    def held(length):
        x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        loss = jax.grad(lambda *x: ops.softmax_attention(*x).sum(), (0, 1, 2))
        return jax.jit(loss).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert held(8192) < 6 * held(2048)


def test_a_name_runs_or_says_why_not(qkv):
    with pytest.raises(ops.UnsupportedImplementationError, match=r"needs a GPU; .* on 'cpu'"):
        ops.softmax_attention(*qkv, implementation="cudnn")
    with pytest.raises(ValueError, match=r"expected None or one of \['block_sparse'"):
        ops.softmax_attention(*qkv, implementation="flash")


def test_bad_arguments_are_named(no_type_hook, qkv):
    q, k, v = qkv
    bad = {
        "q: expected 4 axes": ((q[0], k, v), {}),
        "k: expected a floating-point dtype": ((q, k.astype(int), v), {}),
        "v: expected the dtype of q": ((q, k, v.astype(jnp.bfloat16)), {}),
        "k: expected no empty axis": ((q, k[:, :0], v[:, :0]), {}),
        "k: expected B=2 and F=8": ((q, k[:1], v), {}),
        "number of heads K that divides the N=3": ((q[:, :, :3], k, v), {}),
        "q: expected at most S=20 queries": ((q, k[:, :20], v[:, :20]), {}),
        "segment_ids: expected as many queries as keys": (
            (q[:, :3], k, v), {"segment_ids": jnp.zeros((B, 3), jnp.int32)},
        ),
        "segment_ids: expected ids that never decrease": (
            (q, k, v), {"segment_ids": jnp.zeros((B, T), jnp.int32).at[0, 0].set(1)},
        ),
        "window: expected a whole number of at least 1, got 0": ((q, k, v), {"window": 0}),
        "window: expected a whole number of at least 1, got 2.5": ((q, k, v), {"window": 2.5}),
        "window: expected None when causal is False": ((q, k, v), {"window": 3, "causal": False}),
        "alibi_slopes: expected shape": ((q, k, v), {"alibi_slopes": jnp.ones(3)}),
        "scale: expected a finite": ((q, k, v), {"scale": float("inf")}),
    }  # fmt: skip
    for message, (arrays, options) in bad.items():
        with pytest.raises(ValueError, match=message):
            softmax_attention(*arrays, **options)
