"""What only agent attention must hold, and how its published form leaks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import ops

T, N, H, AGENTS = 7, 2, 4, 3
attend = functools.partial(ops.agent_attention, implementation="reference")


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _draw(length=T, *, agents=AGENTS, dtype="float64"):
    rng = np.random.default_rng(0)
    shapes = [(1, length, N, H)] * 3 + [(agents, N, H)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def _reads(f, x):
    """Whether output token t depends on input token u, `[T,T]`."""
    jacobian = jax.jacrev(lambda x: f(x).sum(axis=(0, 2, 3)))(x)
    return np.any(np.asarray(jacobian)[:, 0] != 0, axis=(2, 3))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_agents_pooled_from_the_sequence_leak_and_given_ones_do_not(implementation):
    """Causal sums over the keys do not help: pooled agents weigh them by the future."""
    q, k, v, agents = _draw()
    causal = functools.partial(ops.agent_attention, implementation=implementation)
    pooled = _reads(lambda q: causal(q, k, v, ops.pooled_agents(q, (AGENTS,))), q)
    assert np.any(np.triu(pooled, 1))
    for f, x in (
        (lambda q: causal(q, k, v, agents), q),
        (lambda k: causal(q, k, v, agents), k),
        (lambda v: causal(q, k, v, agents), v),
    ):
        assert not np.any(np.triu(_reads(f, x), 1))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_the_published_form_is_two_softmaxes(implementation):
    """Also where agents, keys and queries have biases, and keys are another sequence."""
    q, k, v, _ = _draw()
    k, v = (jnp.concatenate([x, -x], axis=1) for x in (k, v))
    rng = np.random.default_rng(1)
    key_bias = jnp.asarray(rng.standard_normal((N, AGENTS, 2 * T)))
    query_bias = jnp.asarray(rng.standard_normal((N, T, AGENTS)))
    agents = ops.pooled_agents(q, (AGENTS,))
    out = ops.agent_attention(
        q, k, v, agents,
        causal=False, key_bias=key_bias, query_bias=query_bias, implementation=implementation,
    )  # fmt: skip
    read = jax.nn.softmax(jnp.einsum("banh,bsnh->bnas", agents, k) / 2 + key_bias) @ jnp.moveaxis(
        v, 2, 1
    )
    shares = jax.nn.softmax(jnp.einsum("btnh,banh->bnta", q, agents) / 2 + query_bias)
    np.testing.assert_allclose(out, jnp.moveaxis(shares @ read, 1, 2), rtol=1e-10)


def test_rows_sum_to_one_and_have_the_rank_of_the_agents():
    q, k, _, agents = _draw(12)
    units = jnp.broadcast_to(jnp.eye(12)[None, :, None], (1, 12, N, 12))
    weights = np.asarray(attend(q, k, units, agents, causal=False)[0, :, 0])
    assert np.all(weights >= 0)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-12)
    assert np.linalg.matrix_rank(weights) == AGENTS
    causal = np.asarray(attend(q, k, units, agents)[0, :, 0])
    np.testing.assert_allclose(causal.sum(axis=1), 1, rtol=1e-12)


def test_one_agent_gives_every_query_the_same():
    q, k, v, agents = _draw(agents=1)
    out = attend(q, k, v, agents, causal=False)
    np.testing.assert_allclose(out, jnp.broadcast_to(out[:, :1], out.shape), rtol=1e-12)
    np.testing.assert_allclose(attend(q, k, v, agents), attend(-q, k, v, agents), rtol=1e-12)


def test_agents_at_every_query_tend_to_softmax_attention():
    q, k, v, _ = _draw()
    sharp = 1e4 * jnp.eye(T)
    out = attend(q, k, v, q, causal=False, query_bias=jnp.broadcast_to(sharp, (N, T, T)))
    expected = ops.softmax_attention(q, k, v, causal=False, implementation="reference")
    np.testing.assert_allclose(out, expected, rtol=1e-9)


@pytest.mark.parametrize(
    "scores", [[1e4] * 7, [-1e9, -1e9, 0, 0, 1e4, 0, -1e4], [0, 200, 400, 600, 800, 1000, 1200]]
)
def test_scores_of_any_size_and_order(scores):
    """A chunk whose later keys outweigh its first ones by more than float32 can hold."""
    q, _, v, agents = _draw(dtype="float32")
    k = jnp.zeros_like(v)
    bias = jnp.broadcast_to(jnp.asarray(scores, jnp.float32), (N, AGENTS, T))
    bias = bias * jnp.asarray([1, -1, 0.5], jnp.float32)[:, None]
    out, pull = jax.vjp(
        lambda *x: ops.agent_attention(*x, key_bias=bias, chunk_size=16), q, k, v, agents
    )
    wide = [x.astype(jnp.float64) for x in (q, k, v, agents)]
    np.testing.assert_allclose(out, attend(*wide, key_bias=bias), rtol=1e-5, atol=1e-6)
    assert all(np.all(np.isfinite(x)) for x in pull(out))


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 23])
def test_chunks_do_not_show(chunk_size):
    x = _draw(20)
    out = ops.agent_attention(*x, chunk_size=chunk_size)
    np.testing.assert_allclose(out, attend(*x), rtol=1e-9, atol=1e-12)


def test_state_is_a_mean_and_its_weight():
    q, k, v, agents = _draw()
    _, state = ops.agent_attention(q, k, v, agents, return_state=True)
    scores = np.einsum("anh,snh->nas", agents, k[0]) / 2
    np.testing.assert_allclose(state.highest[0], scores.max(axis=-1), rtol=1e-12)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    np.testing.assert_allclose(state.total[0], weights.sum(axis=-1), rtol=1e-12)
    means = weights / weights.sum(axis=-1, keepdims=True) @ np.moveaxis(np.asarray(v[0]), 1, 0)
    np.testing.assert_allclose(state.values[0], means, rtol=1e-10)
    empty = ops.agent_attention_state(1, N, AGENTS, H, dtype=jnp.float64)
    for implementation in ("reference", "xla"):
        out = ops.agent_attention(
            q, k, v, agents, initial_state=empty, implementation=implementation
        )
        np.testing.assert_allclose(out, attend(q, k, v, agents), rtol=1e-10)


def test_adaptive_pools_of_any_grid():
    """The published code needs a square grid; a user with 320 tokens could not run it."""
    q = jnp.arange(6.0).reshape(1, 6, 1, 1)
    np.testing.assert_allclose(ops.pooled_agents(q, (4,))[0, :, 0, 0], [0.5, 1.5, 3.5, 4.5])
    agents = ops.pooled_agents(q, (1, 2), grid=(2, 3))  # columns 0-1 and 1-2 of both rows
    np.testing.assert_allclose(agents[0, :, 0, 0], [2.0, 3.0])
    assert ops.pooled_agents(jnp.zeros((1, 320, 1, 1)), (7, 7), grid=(16, 20)).shape[1] == 49


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [((7,), None, "shape: expected at most as many agents"), ((2, 2), (2, 2), "grid: expected")],
)
def test_pools_that_do_not_fit(shape, grid, message):
    with pytest.raises(ValueError, match=message):
        ops.pooled_agents(jnp.zeros((1, 6, 1, 1)), shape, grid=grid)


@pytest.mark.usefixtures("no_type_hook")
def test_bad_arguments():
    q, k, v, agents = _draw()
    for message, arguments, options in [
        (r"agents: expected shape \[n,N,F\] or", (q, k, v, agents[:, :1]), {}),
        ("agents: expected the dtype of q", (q, k, v, agents.astype(jnp.float32)), {}),
        ("key_bias: expected shape", (q, k, v, agents), {"key_bias": jnp.zeros((N, T, AGENTS))}),
        ("causal: expected True with a state", (q, k, v, agents),
         {"causal": False, "return_state": True}),
        ("q: expected T=7 queries", (q[:, 1:], k, v, agents), {}),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ops.agent_attention(*arguments, **options)
