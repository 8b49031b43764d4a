"""Linear self-attention: its forms, and the weights that make it gradient descent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcattn import ops
from lcattn.probes import regression as probes
from lcattn.probes.regression import LSAConfig, LSAWeights
from lcattn.tasks.regression import LinearRegressionConfig


def random_weights(key, size=5, heads=2, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(key), 4)
    per_token = [jax.random.normal(k, (size, heads, size), dtype) * 0.5 for k in keys[:3]]
    return LSAWeights(*per_token, jax.random.normal(keys[3], (heads, size, size), dtype) * 0.5)


def tokens(key=7, batch=3, length=9, size=5):
    return jax.random.normal(jax.random.key(key), (batch, length, size))


def literal(weights, asking, context):
    """The sum of the definition, term by term, in float64."""
    q, k, v, p = (np.asarray(w, np.float64) for w in vars(weights).values())
    out = np.zeros(asking.shape)
    for b, j in np.ndindex(*asking.shape[:2]):
        for h, e in ((h, e) for h in range(len(p)) for e in np.asarray(context, np.float64)[b]):
            query = np.asarray(asking, np.float64)[b, j] @ q[:, h]
            out[b, j] += (e @ v[:, h] @ p[h]) * (e @ k[:, h] @ query)
    return out


def assert_near(a, b, tolerance):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def test_the_layer_is_its_definition_and_the_librarys_op():
    weights, e = random_weights(0), tokens()
    context = e[:, :-1]
    out = probes.attend(weights, e, context)
    assert_near(out, literal(weights, e, context), 1e-6)
    q, k, v = (
        jnp.einsum("bte,enh->btnh", x, w)
        for x, w in ((e, weights.query), (context, weights.key), (context, weights.value))
    )
    for implementation in ("xla", "reference"):
        sums = ops.linear_attention(
            q, k, v, causal=False, feature_map="identity", scale=1.0, implementation=implementation
        )
        assert_near(jnp.einsum("btnh,nhe->bte", sums, weights.out), out, 1e-6)
    softmax = probes.attend(weights, e, context, kind="softmax")
    expected = jnp.einsum(
        "btnh,nhe->bte", ops.softmax_attention(q, k, v, causal=False), weights.out
    )
    assert_near(softmax, expected, 1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_the_state_is_built_example_by_example(dtype, tolerance):
    weights, e = jax.tree.map(lambda x: x.astype(dtype), (random_weights(1), tokens()))
    state = probes.fast_weights(weights, e[:, :-1])
    assert state.shape == (3, 2, 5, 5)
    exact = probes.attend(*jax.tree.map(lambda x: x.astype("float32"), (weights, e, e[:, :-1])))
    assert_near(probes.read(weights, state, e), exact, tolerance)


def test_a_causal_layer_reads_only_the_past_and_the_query_reads_all():
    model = LSAConfig(token_size=5, num_layers=2, causal=True, init_scale=1.0).make(nnx.Rngs(0))
    weights, e = model.weights, tokens()
    context = e[:, :-1]
    moved = probes.attend(weights[0], context, context, causal=True)
    for j in range(context.shape[1]):
        seen = probes.attend(weights[0], context[:, j : j + 1], context[:, : j + 1])
        assert_near(moved[:, j : j + 1], seen, 1e-5)
    query = e[:, -1:] + probes.attend(weights[0], e[:, -1:], context)
    final = query + probes.attend(weights[1], query, context + moved)
    assert_near(model(e), -final[:, -1, -1], 1e-5)
    assert np.abs(model(e) - probes.predict(weights, e)).max() > 1e-3


def test_only_products_of_weights_count():
    weights, e = random_weights(2), tokens()
    again = LSAWeights.of_products(weights.key_query, weights.out_value)
    assert_near(probes.attend(again, e, e), probes.attend(weights, e, e), 1e-5)
    scores, writes = probes.normalized_products(random_weights(3, heads=1), 4)
    np.testing.assert_allclose(np.diagonal(scores[0])[:4].mean(), 1, rtol=1e-5)
    one = LSAWeights.of_products(scores, writes)
    assert_near(probes.attend(one, e, e), probes.attend(random_weights(3, heads=1), e, e), 1e-5)
    midway = probes.interpolate(one, one, 4)
    assert_near(probes.attend(midway, e, e), probes.attend(one, e, e), 1e-5)


def explicit_descent(x, y, w0, query, rate, steps, curvature=0.0):
    """Gradient descent on the weights; GD++ transforms the inputs between the steps as well."""
    shift, asked = np.zeros_like(w0), query
    residual, answer = y - x @ w0.T, query @ w0.T
    for _ in range(steps):
        n = len(x)
        step = rate / n * residual.T @ x
        residual, answer = residual - x @ step.T, answer + step @ asked
        gram = x.T @ x
        x, asked = x - curvature * x @ gram, asked - curvature * gram @ asked
        shift = shift + step
    return answer, shift


@pytest.mark.parametrize(
    ("dtype", "tolerance", "curvature"),
    [("float32", 1e-5, 0.0), ("float64", 1e-10, 0.0), ("float32", 1e-5, 2e-3),
     ("float64", 1e-10, 2e-3)],
)  # fmt: skip
def test_the_construction_is_gradient_descent(dtype, tolerance, curvature):
    rng = np.random.default_rng(0)
    n, d, m, steps = 45, 12, 8, 100 if not curvature else 6
    x, query = rng.uniform(-1, 1, (n, d)), rng.uniform(-1, 1, d)
    y, w0 = rng.normal(size=(n, m)), rng.normal(size=(m, d))
    expected, shift = explicit_descent(x, y, w0, query, 1.0, steps, curvature)
    if not curvature:  # What is compared with is itself gradient descent on the weights.
        w = w0.copy()
        for _ in range(steps):
            w -= 1.0 / n * (x @ w.T - y).T @ x
        np.testing.assert_allclose(w - w0, shift, atol=1e-12)
    with jax.enable_x64(dtype == "float64"):
        # The tokens of labels hold residuals once W_0 has done its part.
        first = probes.gradient_step(
            d, 1.0, n, initial=jnp.zeros((m, d)), curvature=curvature, dtype=dtype
        )
        e = np.concatenate([np.c_[x, y - x @ w0.T], np.r_[query, -w0 @ query][None]])
        e = jnp.asarray(e, dtype)[None]
        for _ in range(steps):
            e = e + probes.attend(first, e, e[:, :-1])
        assert e.dtype == dtype
        assert_near(-e[0, -1, d:], expected, tolerance)


@pytest.mark.parametrize(("x64", "tolerance"), [(False, 1e-6), (True, 1e-10)])
def test_one_layer_is_one_step_from_any_initial_weights(x64, tolerance):
    rng = np.random.default_rng(1)
    n, d, m = 10, 12, 8
    x, query = rng.uniform(-1, 1, (n, d)), rng.uniform(-1, 1, d)
    y, w0 = rng.normal(size=(n, m)), rng.normal(size=(m, d))
    step = -1.0 / n * (x @ w0.T - y).T @ x
    with jax.enable_x64(x64):
        dtype = jnp.float64 if x64 else jnp.float32
        weights = probes.gradient_step(d, 1.0, n, initial=jnp.asarray(w0), dtype=dtype)
        e = jnp.asarray(np.concatenate([np.c_[x, y], np.r_[query, -w0 @ query][None]]), dtype)
        e = (e + probes.attend(weights, e[None], e[None, :-1]))[0]
        assert_near(e[:-1, d:], y - x @ step.T, tolerance)
        assert_near(-e[-1, d:], (w0 + step) @ query, tolerance)


def test_symmetries_of_the_prediction():
    task = LinearRegressionConfig(dim=4, num_examples=6)
    e = task.sample(jax.random.key(0), 5).tokens()
    model = LSAConfig(token_size=5, num_layers=2, num_heads=2, init_scale=1.0).make(nnx.Rngs(1))
    shuffled = e[:, jnp.array([3, 0, 5, 1, 4, 2, 6])]
    assert_near(model(shuffled), model(e), 1e-5)
    descent = [probes.gradient_step(4, 3.0, 6, curvature=0.1)] * 2
    doubled = e.at[..., -1].multiply(2.5)
    assert_near(probes.predict(descent, doubled), 2.5 * probes.predict(descent, e), 1e-5)
    assert_near(
        probes.predict(descent, e),
        probes.DescentConfig(rates=(3.0, 3.0), curvatures=(0.1, 0.1))(e),
        1e-5,
    )
    nothing = probes.predict([probes.gradient_step(4, 0.0, 6)], e)
    np.testing.assert_array_equal(np.asarray(nothing), 0)


def test_damped_steps_are_smaller_steps_of_descent():
    task = LinearRegressionConfig(dim=3, num_examples=5)
    e = task.sample(jax.random.key(2), 4).tokens()
    said = probes.roll_out(probes.gradient_step(3, 6.0, 5), e, steps=4, damping=0.5)
    expected = [probes.DescentConfig(rates=(3.0,) * k)(e) for k in range(1, 5)]
    assert_near(said, np.stack(expected), 1e-5)
