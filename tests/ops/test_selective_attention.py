"""What temperatures do to attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import ops


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _draw(T=8, H=8, seed=0, dtype="float64"):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal((1, T, 1, H)), dtype) for _ in range(3))


def _attend(q, k, v, *temperatures, **options):
    return ops.selective_attention(q, k, v, *temperatures, implementation="reference", **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_temperatures_of_one_change_nothing(dtype):
    q, k, v = _draw(dtype=dtype)
    ones = jnp.ones((1, 8, 1), jnp.float32)
    expected = ops.softmax_attention(q, k, v)
    np.testing.assert_array_equal(ops.selective_attention(q, k, v), expected)
    np.testing.assert_array_equal(ops.selective_attention(q, k, v, ones, ones), expected)


def test_a_constant_temperature_is_a_scale():
    """TempScale: softmax(scores / T)."""
    q, k, v = _draw()
    out = _attend(q, k, v, jnp.full((1, 8, 1), 1 / 0.7))
    np.testing.assert_allclose(out, ops.softmax_attention(q, k, v, scale=8**-0.5 / 0.7), rtol=1e-6)


def test_cold_rows_average_and_hot_rows_choose():
    q, k, v = _draw()
    k = k.at[:, 5].set(k[:, 2])
    q = q.at[:, 7].set(k[:, 2] * 3)
    cold = _attend(q, k, v, jnp.zeros((1, 8, 1)))
    np.testing.assert_allclose(cold[0, :, 0], np.cumsum(v[0, :, 0], 0) / np.arange(1, 9)[:, None])
    hot = _attend(q, k, v, jnp.full((1, 8, 1), 1e6))
    np.testing.assert_allclose(hot[0, 7, 0], (v[0, 2, 0] + v[0, 5, 0]) / 2, rtol=1e-9)


def test_a_value_temperature_is_not_an_output_gate():
    """Some re-implementations scale the output row instead."""
    q, k, v = _draw()
    tau = jnp.asarray(np.random.default_rng(1).uniform(0, 2, (1, 8, 1)))
    on_outputs = tau[..., None] * _attend(q, k, v)
    assert np.abs(_attend(q, k, v, None, tau) - on_outputs).max() > 0.1
    same = jnp.full((1, 8, 1), 0.3)
    np.testing.assert_allclose(_attend(q, k, v, None, same), 0.3 * _attend(q, k, v), rtol=1e-12)


def test_the_gradient_of_a_temperature_is_q_times_dq():
    q, k, v = _draw()
    tau = jnp.asarray(np.random.default_rng(1).uniform(0.5, 2, (1, 8, 1)))
    d_tau = jax.grad(lambda tau: jnp.sum(jnp.sin(_attend(q, k, v, tau))))(tau)
    d_q = jax.grad(lambda q: jnp.sum(jnp.sin(_attend(q, k, v))))(tau[..., None] * q)
    np.testing.assert_allclose(d_tau, jnp.sum(q * d_q, axis=-1), rtol=1e-9)
    assert d_tau[0, 0, 0] == pytest.approx(0, abs=1e-12)  # one key: nothing to sharpen


def test_entropy_falls_by_tau_times_the_variance_of_scores():
    q, k, _ = _draw()
    units = jnp.eye(8)[None, :, None]

    def entropy(tau):
        weights = _attend(q, k, units, jnp.full((1, 8, 1), tau))[0, 7, 0]
        return -jnp.sum(weights * jnp.log(weights))

    scores = np.asarray(k[0, :, 0] @ q[0, 7, 0]) / np.sqrt(8)
    p = np.exp(1.7 * scores) / np.exp(1.7 * scores).sum()
    variance = p @ scores**2 - (p @ scores) ** 2
    assert jax.grad(entropy)(1.7) == pytest.approx(-1.7 * variance, rel=1e-9)


def test_large_queries_and_temperatures_stay_finite():
    q, k, v = _draw(dtype="bfloat16")
    tau = jnp.full((1, 8, 1), 8.0)
    out, pull = jax.vjp(lambda q, tau: ops.selective_attention(1e3 * q, k, v, tau), q, tau)
    assert all(np.all(np.isfinite(x.astype(jnp.float32))) for x in (out, *pull(out)))


@pytest.mark.parametrize("name", ["query_temperature", "value_temperature"])
@pytest.mark.usefixtures("no_type_hook")
def test_temperatures_of_another_shape(name):
    with pytest.raises(ValueError, match=rf"{name}: expected shape .* = \(1, 8, 1\), got \(1, 8\)"):
        ops.selective_attention(*_draw(), **{name: jnp.ones((1, 8))})
