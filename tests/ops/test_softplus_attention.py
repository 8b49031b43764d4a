"""What only LSSA and LSSAR must hold, and what published code gets wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import ops


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _draw(T=9, *, N=1, H=4, seed=0, dtype="float64"):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal((1, T, N, H)), dtype) for _ in range(3))


def _weights(q, k, **options):
    """The map `[T,S]` that is applied to the values: outputs for the unit vectors as values."""
    units = jnp.broadcast_to(jnp.eye(k.shape[1], dtype=q.dtype), (1, k.shape[1], k.shape[1]))
    return np.asarray(ops.softplus_attention(q, k, units[:, :, None], **options)[0, :, 0])


def _published(q, k, power, *, epsilon=0.0, dtype=np.float32):
    """The public re-implementation: y^p before it is divided, rows and lengths by their index."""
    q, k = (np.asarray(x[0, :, 0], np.float64) for x in (q, k))
    cosines = q @ k.T / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(k, axis=1)
    length = np.arange(1, len(q) + 1)[:, None]
    weights = np.tril(np.logaddexp(np.log(q.shape[1]) * np.log(length) * cosines, 0))
    relative = (length * weights / weights.sum(axis=1, keepdims=True)).astype(dtype)
    excess = np.maximum(relative - (length > 3), 0).astype(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        raised = excess ** dtype(power)
        return raised / (raised.sum(axis=1, keepdims=True) + dtype(epsilon))


@pytest.mark.parametrize("power", [None, 15.0])
def test_rows_sum_to_one_and_the_first_reads_itself(power):
    q, k, _ = _draw()
    weights = _weights(q, k, power=power)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(weights[0, 0], 1, rtol=1e-12)
    assert not np.any(np.triu(weights, 1))


def test_power_one_without_offset_is_lssa():
    q, k, v = _draw()
    plain = ops.softplus_attention(q, k, v)
    np.testing.assert_allclose(
        ops.softplus_attention(q, k, v, power=1.0, offset=0.0), plain, rtol=1e-12
    )


def test_the_threshold_is_the_mean_from_the_fourth_row_on():
    q, k, _ = _draw(12)
    first, second = _weights(q, k), _weights(q, k, power=3.0)
    for t in range(12):
        above = first[t, : t + 1] * (t + 1) > (1 if t >= 3 else 0)
        np.testing.assert_array_equal(second[t, : t + 1] > 0, above)


def test_a_high_power_finds_the_closest_key_and_ties_share():
    q, k, _ = _draw(8)
    k = k.at[:, 5].set(k[:, 2])
    q = q.at[:, 7].set(k[:, 2])
    expected = np.zeros(8)
    expected[[2, 5]] = 0.5
    np.testing.assert_allclose(_weights(q, k, power=2000.0)[7], expected, atol=1e-12)


def test_lengths_of_queries_and_keys_do_not_matter():
    q, k, v = _draw()
    factors = jnp.asarray(np.random.default_rng(1).uniform(0.5, 20, (2, 1, 9, 1, 1)))
    attend = functools.partial(ops.softplus_attention, power=15.0)
    np.testing.assert_allclose(attend(factors[0] * q, factors[1] * k, v), attend(q, k, v), 1e-9)
    gradient = jax.grad(lambda q: jnp.sum(attend(q, k, v) ** 2))(q)
    np.testing.assert_allclose(jnp.sum(gradient * q, axis=-1), 0, atol=1e-10)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_flat_rows_average(implementation):
    """Published: 0 / (0 + epsilon), so that rows whose keys are all alike read nothing."""
    q, k, v = _draw(6, dtype="float32")
    k = jnp.broadcast_to(k[:, :1], k.shape)

    def attend(q, k, v, power):
        return ops.softplus_attention(q, k, v, power=power, implementation=implementation)

    means = np.cumsum(v, axis=1) / np.arange(1, 7)[:, None, None]
    np.testing.assert_allclose(attend(q, k, v, 15.0), means, rtol=1e-5, atol=1e-6)
    assert not np.any(_published(q, k, 15, epsilon=1e-8)[4:])

    def gradients(power):
        rows = slice(4, None)  # the exempt rows raise their weights
        return jax.grad(lambda *x: jnp.sum(attend(*x, power)[:, rows] ** 2), (0, 1, 2))(q, k, v)

    for found, expected in zip(gradients(15.0), gradients(None), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_one_key_against_all_others_does_not_overflow():
    """Published: y^15 is inf in float32 from an excess of 370 on."""
    T = 1000
    q = jnp.ones((1, T, 1, 64), jnp.float32)
    k = -q.at[:, 7].multiply(-1)
    assert not np.all(np.isfinite(_published(q, k, 15)[-1]))
    v = jnp.arange(T, dtype=jnp.float32)[None, :, None, None] * jnp.ones((1, 1, 1, 64))
    v = v.astype(jnp.float32)
    out, pull = jax.vjp(lambda *x: ops.softplus_attention(*x, power=15.0), q, k, v)
    np.testing.assert_allclose(out[0, 8:, 0, 0], 7, rtol=1e-6)
    assert all(np.all(np.isfinite(x)) for x in pull(out))


def test_weak_rows_keep_their_weight():
    """Published: an epsilon of 1e-8 beside W = 0.29^15 takes half of the output."""
    q, k, _ = _draw(6, seed=3)
    aligned = k[:, 0] + 4 * jnp.ones(4)  # keys that are nearly alike: small excesses
    k = jnp.stack([aligned + 1.4 * k[:, s] for s in range(6)], axis=1)
    exact = _published(q, k, 15, dtype=np.float64)[5]
    leaking = _published(q, k, 15, epsilon=1e-8, dtype=np.float64)[5]
    assert leaking.sum() < 0.9
    np.testing.assert_allclose(_weights(q, k, power=15.0)[5], exact, rtol=1e-9)


def test_packed_rows_count_their_own_document():
    """Published: the row's index, so that a second document is scaled as if it were longer."""
    q, k, _ = _draw(10)
    ids = jnp.asarray([[0] * 5 + [1] * 5], jnp.int32)
    packed = _weights(q, k, power=3.0, segment_ids=ids)[5:, 5:]
    alone = _weights(q[:, 5:], k[:, 5:], power=3.0)
    np.testing.assert_allclose(packed, alone, atol=1e-12)

    def by_index(q, k):
        cosines = q @ k.T / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(k, axis=1)
        length = np.arange(6, 11)[:, None]
        weights = np.tril(np.logaddexp(np.log(4) * np.log(length) * cosines, 0))
        return weights / weights.sum(axis=1, keepdims=True)

    plain = _weights(q, k, segment_ids=ids)[5:, 5:]
    assert np.abs(by_index(np.asarray(q[0, 5:, 0]), np.asarray(k[0, 5:, 0])) - plain).max() > 0.01


def test_dropped_keys_still_have_a_gradient():
    q, k, v = _draw(8)
    dropped = np.flatnonzero(_weights(q, k, power=3.0)[7] == 0)
    gradient = jax.grad(lambda k: jnp.sum(ops.softplus_attention(q, k, v, power=3.0)[0, 7] ** 2))(k)
    assert dropped.size
    assert np.all(np.any(gradient[0, dropped, 0] != 0, axis=-1))


@pytest.mark.parametrize("new", [1, 4])
def test_queries_continue_a_cache_that_is_not_full(new):
    q, k, v = _draw(12)
    whole = ops.softplus_attention(q, k, v, power=15.0)
    cache = [x.at[:, 9:].set(jnp.nan) for x in (k, v)]
    cache = [jnp.where(jnp.isnan(x), 100.0, x) for x in cache]
    out = ops.softplus_attention(q[:, 9 - new : 9], *cache, power=15.0, query_position=9 - new)
    np.testing.assert_allclose(out, whole[:, 9 - new : 9], rtol=1e-12)


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e18])
def test_vectors_of_any_length_are_finite(size):
    q, k, v = _draw(dtype="float32")
    out, pull = jax.vjp(
        lambda q, k: ops.softplus_attention(q, k, v, power=15.0), size * q, size * k
    )
    assert all(np.all(np.isfinite(x)) for x in (out, *pull(out)))


def test_memory_of_a_gradient_grows_with_the_length_only():
    def gradient_memory(T):
        x = jax.ShapeDtypeStruct((1, T, 1, 16), jnp.float32)
        loss = lambda *x: jnp.sum(ops.softplus_attention(*x, power=15.0))  # noqa: E731
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert gradient_memory(4096) < 2.5 * gradient_memory(2048)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": 0.0}, "power: expected None or a number of at least 1, got 0.0"),
        ({"power": float("nan")}, "power"),
        ({"power": 3.0, "offset": -1.0}, "offset: expected a number of at least 0"),
        ({"power": 3.0, "exempt_rows": -1}, "exempt_rows"),
        ({"scale": float("inf")}, "scale"),
        ({"implementation": "cudnn"}, "implementation"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ops.softplus_attention(*_draw(), **options)


def test_segments_and_positions_exclude_each_other():
    ids = jnp.zeros((1, 9), jnp.int32)
    with pytest.raises(ValueError, match="segment_ids: expected None where positions are given"):
        ops.softplus_attention(*_draw(), segment_ids=ids, query_position=0)


@pytest.mark.parametrize("power", [None, 15.0])
def test_one_query_against_a_half_filled_cache(power):
    """In one piece, and as the definition has it, with shared key heads."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, *s))) for s in [(1, 4, 8), (9, 2, 8), (9, 2, 8)])

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(implementation, position):
        def loss(q, k, v):
            out = ops.softplus_attention(
                q, k, v, power=power, query_position=position, implementation=implementation
            )
            return jnp.sum(jnp.sin(out)), out

        return jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

    for position in (0, 5):
        found, expected = (value_and_gradients(name, position) for name in (None, "reference"))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_the_step_takes_one_query():
    with pytest.raises(ValueError, match="'step' takes one query, not T=9"):
        ops.softplus_attention(*_draw(), implementation="step")
