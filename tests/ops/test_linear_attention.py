"""What linear attention, and its Taylor similarity, must do by theory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import ops

from lcattn.ops import linear_attention
from lcattn.ops.linear_attention import features
from lcattn.testing.conformance.compare import assert_close

B, T, N, K, F, H = 2, 37, 4, 2, 16, 8


def draw(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.fixture
def qkv():
    return draw(0, B, T, N, F), draw(1, B, T, K, F), draw(2, B, T, K, H)


@jax.jit
def taylor(q, k, v):
    return ops.linear_attention(q, k, v, chunk_size=8)


def test_packed_features_equal_the_published_ones():
    q, k = draw(0, 50, F), draw(1, 50, F)

    def published(x):  # 1 + F + F² of them
        square = (x[:, :, None] * x[:, None, :]).reshape(len(x), -1)
        return jnp.concatenate(
            [jnp.ones((len(x), 1)), x / F**0.25, square / (np.sqrt(2) * F**0.5)], axis=1
        )

    packed = features.TAYLOR.query_features(q * F**-0.5) @ features.TAYLOR.key_features(k).T
    assert features.TAYLOR.key_features(k).shape == (50, 153)
    assert_close("p", packed, published(q) @ published(k).T, 1e-6)


def test_weights_are_at_least_one_half():
    x = np.linspace(-50, 50, 100_001)
    p = np.asarray(features.TAYLOR.score(x))
    assert p.min() == 0.5
    assert x[p.argmin()] == -1


def test_outputs_are_convex_combinations_of_values(qkv):
    q, k, v = qkv
    out = np.asarray(taylor(30 * q, 30 * k, v)).reshape(B, T, K, N // K, H)
    seen = np.asarray(v)[:, :, :, None]
    assert np.all(out <= np.maximum.accumulate(seen, axis=1) + 1e-5)
    assert np.all(out >= np.minimum.accumulate(seen, axis=1) - 1e-5)
    ones = taylor(30 * q, 30 * k, jnp.ones_like(v))
    np.testing.assert_allclose(ones, 1, rtol=1e-5)


def test_a_zero_query_or_key_takes_the_running_mean(qkv):
    q, k, v = qkv
    mean = jnp.cumsum(v, axis=1) / jnp.arange(1, T + 1)[:, None, None]
    mean = jnp.repeat(mean, N // K, axis=2)
    assert_close("q = 0", taylor(0 * q, k, v), mean, 1e-5)
    assert_close("k = 0", taylor(q, 0 * k, v), mean, 1e-5)


def test_the_first_token_gets_its_own_value(qkv):
    q, k, v = qkv
    assert_close("o_0", taylor(q, k, v)[:, 0], jnp.repeat(v[:, 0], N // K, axis=1), 1e-6)


def test_small_scores_give_softmax_up_to_the_third_order(qkv):
    q, k, v = qkv
    error = []
    for size in (0.2, 0.1):
        with jax.enable_x64(True):
            arrays = [jnp.asarray(np.asarray(x, np.float64)) for x in (size * q, k, v)]
            difference = ops.linear_attention(*arrays) - ops.softmax_attention(*arrays)
            error.append(float(jnp.abs(difference).max()))
    assert 6 < error[0] / error[1] < 10  # 2³


@pytest.mark.parametrize("feature_map", ["taylor", "identity"])
def test_rotation_and_sign_flip_of_queries_and_keys_change_nothing(qkv, feature_map):
    q, k, v = qkv
    run = jax.jit(lambda q, k: ops.linear_attention(q, k, v, feature_map=feature_map))
    rotation = jnp.linalg.qr(draw(3, F, F))[0]
    expected = run(q, k)
    assert_close("rotated", run(q @ rotation, k @ rotation), expected, 1e-4)
    assert_close("flipped", run(-q, -k), expected, 1e-6)


def test_the_order_of_the_past_does_not_matter(qkv):
    q, k, v = qkv
    order = np.append(np.random.default_rng(0).permutation(T - 1), T - 1)
    shuffled = taylor(q[:, order], k[:, order], v[:, order])
    assert_close("last output", shuffled[:, -1], taylor(q, k, v)[:, -1], 1e-5)


def test_unlike_softmax_a_shift_of_all_scores_matters(qkv):
    q, k, v = qkv
    shifted = taylor(q.at[..., 0].add(1), k.at[..., 0].set(1), v)
    assert float(jnp.abs(shifted - taylor(q, k.at[..., 0].set(1), v)).max()) > 1e-3


def test_normalisation_by_default():
    v = draw(0, 1, 5, 1, H)
    q = k = jnp.ones((1, 5, 1, F))
    for feature_map in ("taylor", "elu", lambda x: x * x):
        ones = ops.linear_attention(q, k, jnp.ones_like(v), feature_map=feature_map)
        np.testing.assert_allclose(ones, 1, rtol=1e-6)
    sums = ops.linear_attention(q, k, jnp.ones_like(v), feature_map="identity", scale=1 / F)
    np.testing.assert_allclose(sums[0, :, 0, 0], [1, 2, 3, 4, 5], rtol=1e-6)


def test_rows_whose_weights_sum_to_zero_give_zeros(qkv):
    q, k, v = qkv
    run = jax.jit(
        jax.value_and_grad(
            lambda k: ops.linear_attention(q, k, v, feature_map=jax.nn.relu).sum()
        )
    )  # fmt: skip
    value, gradient = run(-jnp.abs(k))
    assert value == 0
    assert np.all(np.isfinite(gradient))


def test_zero_keys_count_and_padding_does_not(qkv):
    q, k, v = qkv
    pad = 5
    expected = taylor(q[:, pad:], k[:, pad:], v[:, pad:])
    blank_k, blank_v = k.at[:, :pad].set(0), v.at[:, :pad].set(0)
    blanked = taylor(q, blank_k, blank_v)[:, pad:]
    assert float(jnp.abs(blanked - expected).max()) > 0.1  # phi(0) is not 0
    ids = jnp.where(jnp.arange(T) < pad, -1, 0)[None].repeat(B, 0)
    padded = jax.jit(ops.linear_attention)(q, k, v, segment_ids=ids)
    assert_close("padded", padded[:, pad:], expected, 1e-5)


def test_a_state_in_float32_keeps_counting_in_bfloat16():
    length = 1024  # a bfloat16 sum of ones stops at 256
    q, k, v = (draw(i, 1, length, 1, size, dtype=jnp.bfloat16) for i, size in enumerate((F, F, H)))
    whole, final = jax.jit(lambda *x: ops.linear_attention(*x, return_state=True))(q, k, v)

    @jax.jit
    def decode(q, k, v):
        def step(state, token):
            out, state = ops.linear_attention(
                *(x[:, None] for x in token), initial_state=state, return_state=True
            )
            return state, out[:, 0]

        start = ops.linear_attention_state(1, 1, F, H)
        return jax.lax.scan(step, start, [x.swapaxes(0, 1) for x in (q, k, v)])

    state, out = decode(q, k, v)
    assert state.normalizer.dtype == final.kv.dtype == jnp.float32
    assert state.normalizer[0, 0, 0] == final.normalizer[0, 0, 0] == length
    assert_close("decoded", out.swapaxes(0, 1), whole, 5e-3)


def test_keys_and_queries_may_differ_in_number_when_not_causal(qkv):
    q, k, v = qkv
    run = jax.jit(lambda q, name: ops.linear_attention(
        q, k, v, causal=False, chunk_size=8, implementation=name
    ), static_argnums=1)  # fmt: skip
    for length in (3, 2 * T):
        longer = jnp.concatenate([q, q], axis=1)[:, :length]
        assert_close(f"T={length}", run(longer, "xla"), run(longer, "reference"), 1e-5)


def test_memory_of_a_gradient_grows_with_the_length():
    def held(length, **options):
        shapes = [jax.ShapeDtypeStruct((1, length, 1, size), jnp.float32) for size in (F, F, 16)]
        loss = jax.grad(lambda *x: ops.linear_attention(*x, **options).sum(), (0, 1, 2))
        return jax.jit(loss).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert held(8192) < 6 * held(2048)
    assert held(2048, chunk_size=2048) > 10 * held(512, chunk_size=512)  # the quadratic form


def test_bad_arguments_are_named(no_type_hook, qkv):
    q, k, v = qkv
    ids = jnp.zeros((B, T), jnp.int32)
    state = ops.linear_attention_state(B, K, F, H)
    bad = {
        "q: expected 4 axes": ((q[0], k, v), {}),
        "v: expected 4 axes": ((q, k, v[..., 0]), {}),
        "q: expected a floating-point dtype": ((q.astype(int), k, v), {}),
        "k: expected the dtype of q": ((q, k.astype(jnp.bfloat16), v), {}),
        "q: expected no empty axis": ((q[:, :0], k[:, :0], v[:, :0]), {}),
        "k: expected B=2 and F=16": ((q, k[..., :8], v), {}),
        "v: expected B, S, K": ((q, k, v[:, :5]), {}),
        "number of heads K that divides the N=3": ((q[:, :, :3], k, v), {}),
        "q: expected T=37 queries": ((q[:, :5], k, v), {}),
        "segment_ids: expected shape": ((q, k, v), {"segment_ids": ids[:, :5]}),
        "segment_ids: expected an integer": ((q, k, v), {"segment_ids": ids * 1.0}),
        "segment_ids: expected ids that never decrease": (
            (q, k, v), {"segment_ids": ids.at[1, 3].set(4)},
        ),
        "scale: expected a finite": ((q, k, v), {"scale": float("nan")}),
        "feature_map: expected 'taylor'": ((q, k, v), {"feature_map": "exp"}),
        "feature_map: expected a map over the last": (
            (q, k, v), {"feature_map": lambda x: x.sum(-1)},
        ),
        "chunk_size: expected a whole number": ((q, k, v), {"chunk_size": 0}),
        "implementation: expected None or one of": ((q, k, v), {"implementation": "cuda"}),
        "initial_state.kv: expected shape": (
            (q, k, v), {"initial_state": ops.linear_attention_state(B + 1, K, F, H)},
        ),
        "initial_state: expected no normalizer": (
            (q, k, v), {"initial_state": state, "normalize": False},
        ),
    }  # fmt: skip
    for message, (arrays, options) in bad.items():
        with pytest.raises(ValueError, match=message):
            linear_attention(*arrays, **options)


@pytest.mark.parametrize("feature_map", ["taylor", "identity"])
def test_one_token_takes_the_step_and_gives_what_chunks_give(qkv, feature_map):
    past, token = ([x[:, :20] for x in qkv], [x[:, 20:21] for x in qkv])
    _, state = linear_attention(*past, feature_map=feature_map, return_state=True)
    cotangent = draw(5, B, 1, N, H)

    @functools.partial(jax.jit, static_argnums=2)
    def run(token, state, implementation):
        def step(token, state):
            return linear_attention(
                *token, feature_map=feature_map, initial_state=state, return_state=True,
                implementation=implementation,
            )  # fmt: skip

        (out, after), pull = jax.vjp(step, token, state)
        return out, after, pull((cotangent, jax.tree.map(jnp.ones_like, after)))

    expected, automatic = run(token, state, "xla"), run(token, state, None)
    for got, want in zip(*map(jax.tree.leaves, (automatic, expected)), strict=True):
        assert_close("step", got, want, 2e-6)
    named = run(token, state, "step")
    assert all(map(jnp.array_equal, *map(jax.tree.leaves, (automatic, named))))
    with pytest.raises(ValueError, match="one token"):
        linear_attention(*qkv, implementation="step")
    none = [x[:0] for x in token]
    assert jax.eval_shape(linear_attention, *none).shape == (0, 1, N, H)
