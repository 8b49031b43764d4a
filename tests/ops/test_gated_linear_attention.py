"""What a decaying state must do by theory; the suite checks the rest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import ops

from lcattn.ops import gated_linear_attention, recurrence
from lcattn.ops.decay import between_tokens, inside_chunks
from lcattn.testing.conformance.compare import assert_close, assert_finite

B, T, N, K, F, H = 2, 21, 4, 2, 4, 6


def draw(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.fixture
def qkv():
    return draw(0, B, T, N, F), draw(1, B, T, K, F), draw(2, B, T, K, H)


@jax.jit
def gated(q, k, v, log_decay, initial_state=None):
    return ops.gated_linear_attention(
        q, k, v, log_decay, initial_state=initial_state, return_state=True, chunk_size=8
    )


def test_without_decay_it_is_linear_attention(qkv):
    expected, state = ops.linear_attention(*qkv, feature_map="identity", return_state=True)
    out, final = gated(*qkv, jnp.zeros((B, T, K)))
    assert_close("output", out, expected, 1e-6)
    assert_close("state", final, state.kv, 1e-6)


def test_a_start_of_zeros_is_no_part_of_the_gradient(qkv):
    """Which would be one more pass over all keys and values."""
    _, pull = jax.vjp(lambda k, v: recurrence.start(None, k, v), *qkv[1:])
    for gradient in pull(jnp.full((B, K, F, H), jnp.inf)):
        np.testing.assert_array_equal(gradient, 0)


def test_equal_channels_are_one_gate_a_head(qkv):
    log_decay = -jnp.abs(draw(3, B, T, N))
    by_channel = jnp.broadcast_to(log_decay[..., None], (B, T, N, F))
    assert_close("(output, state)", gated(*qkv, by_channel), gated(*qkv, log_decay), 1e-6)


def test_gates_of_key_heads_share_states_among_queries(qkv):
    log_decay = -jnp.abs(draw(3, B, T, K))
    out, state = gated(*qkv, log_decay)
    repeated, states = gated(*qkv, jnp.repeat(log_decay, N // K, axis=2))
    assert state.shape == (B, K, F, H)
    assert_close("output", out, repeated, 1e-6)
    assert_close("states", jnp.repeat(state, N // K, axis=1), states, 1e-6)


def test_retention_is_a_constant_decay(qkv):
    q, k, v = qkv
    gamma = 1 - 2.0 ** -(5 + np.arange(N))
    out, _ = gated(q, k, v, jnp.broadcast_to(jnp.log(jnp.float32(gamma)), (B, T, N)))
    distance = np.arange(T)[:, None] - np.arange(T)
    weights = np.where(distance >= 0, gamma[:, None, None] ** np.maximum(distance, 0), 0)
    k, v = (np.repeat(x, N // K, axis=2) for x in (k, v))
    scores = np.einsum("btnf,bsnf->bnts", q, k) * weights / np.sqrt(F)
    assert_close("output", out, np.einsum("bnts,bsnh->btnh", scores, v), 2e-6)


def test_mamba_2_is_a_case_of_it():
    """h = exp(Delta a) h + Delta B u, y = C h: g = Delta a, k = B, v = Delta u, q = C, scale 1."""
    rng = np.random.default_rng(0)
    step, a = rng.uniform(0.01, 1, (B, T, N)), -rng.uniform(1, 16, N)
    b, c, u = (rng.standard_normal((B, T, N, size)) for size in (F, F, H))
    state, y = np.zeros((B, N, F, H)), np.zeros((B, T, N, H))
    for t in range(T):
        write = step[:, t, :, None, None] * b[:, t, ..., None] * u[:, t, :, None]
        state = np.exp(step[:, t] * a)[..., None, None] * state + write
        y[:, t] = np.einsum("bnf,bnfh->bnh", c[:, t], state)
    q, k, v, g = (jnp.float32(x) for x in (c, b, step[..., None] * u, step * a))
    assert_close("output", ops.gated_linear_attention(q, k, v, g, scale=1.0), y, 2e-6)


@pytest.mark.parametrize("by_channel", [False, True], ids=["head", "channel"])
@pytest.mark.parametrize("strength", [-1e3, -1e30, -np.inf])
def test_the_strongest_decay_leaves_the_current_write(qkv, by_channel, strength):
    q, k, v = qkv
    log_decay = jnp.full((B, T, K, F) if by_channel else (B, T, K), strength)
    state = draw(4, B, K, F, H)

    def loss(*inputs):
        out, final = gated(*inputs)
        return (out**2).sum() + (final**2).sum(), (out, final)

    inputs = (q, k, v, log_decay, state)
    (_, (out, final)), gradients = jax.value_and_grad(loss, range(5), has_aux=True)(*inputs)
    scores = jnp.einsum("btkgf,btkf->btkg", q.reshape(B, T, K, -1, F), k) / F**0.5
    current = scores[..., None] * v[:, :, :, None]
    assert_close("output", out, current.reshape(out.shape), 1e-6)
    assert_close("state", final, jnp.einsum("bkf,bkh->bkfh", k[:, -1], v[:, -1]), 1e-6)
    assert_finite("gradients", gradients)
    assert not np.any(gradients[3]), "a decay of 0 has no slope"


def test_a_reset_of_one_channel_leaves_the_others(qkv):
    q, k, v = qkv
    log_decay = jnp.zeros((B, T, K, F)).at[:, 9, :, 1].set(-jnp.inf)
    _, state = gated(q, k, v, log_decay)
    whole = jnp.einsum("btkf,btkh->bkfh", k, v)
    after = jnp.einsum("btkf,btkh->bkfh", k[:, 9:], v[:, 9:])
    assert_close("channel 1", state[:, :, 1], after[:, :, 1], 1e-6)
    assert_close("channel 0", state[:, :, 0], whole[:, :, 0], 1e-6)


def test_a_strong_decay_costs_later_ones_no_digits():
    """Differences of cumulative sums would have four decimals left after -1000."""
    weak = -np.abs(np.random.default_rng(0).standard_normal(16)) * 1e-3
    weak[3] = -1e3
    sums = between_tokens(inside_chunks(jnp.float32(weak)[:, None]))
    expected = np.array([[weak[s + 1 : t + 1].sum() for s in range(16)] for t in range(16)])
    seen = np.tri(16, dtype=bool)
    np.testing.assert_allclose(np.asarray(sums)[seen], expected[seen], rtol=1e-6)
    assert np.all(np.isneginf(np.asarray(sums)[~seen]))


def test_chunks_change_nothing(qkv):
    log_decay = -jnp.abs(draw(3, B, T, K, F))
    expected = ops.gated_linear_attention(*qkv, log_decay, implementation="reference")
    for chunk_size in (1, 5, 1000):
        run = jax.jit(functools.partial(ops.gated_linear_attention, chunk_size=chunk_size))
        out = run(*qkv, log_decay)
        assert_close(f"chunks of {chunk_size}", out, expected, 1e-6)


def test_nothing_but_the_inputs_is_kept_for_the_gradient(qkv):
    inputs = (*qkv, -jnp.abs(draw(3, B, T, K, F)), draw(4, B, K, F, H))
    _, pull_back = jax.vjp(
        lambda *x: ops.gated_linear_attention(*x[:4], initial_state=x[4]), *inputs
    )
    # The inputs, and once more as reshaped; chunk states alone would be as many numbers again.
    kept = sum(x.size for x in jax.tree.leaves(pull_back))
    assert kept <= sum(x.size for x in inputs) + B * T


def test_second_derivatives_exist(qkv):
    q, k, v = qkv
    log_decay = -jnp.abs(draw(3, B, T, K))

    def loss(log_decay):
        return (gated(q, k, v, log_decay)[0] ** 2).sum()

    direction = draw(5, B, T, K)
    _, slope = jax.jvp(jax.grad(loss), (log_decay,), (direction,))
    step = 1e-3
    ahead, behind = (jax.grad(loss)(log_decay + sign * step * direction) for sign in (1, -1))
    assert_close("slope", slope, (ahead - behind) / (2 * step), 1e-2)


def test_no_rows():
    q, k, v = (jnp.zeros((0, T, heads, F)) for heads in (N, K, K))
    out, state = ops.gated_linear_attention(q, k, v, jnp.zeros((0, T, N)), return_state=True)
    assert out.shape == (0, T, N, F)
    assert state.shape == (0, N, F, F)


@pytest.mark.usefixtures("no_type_hook")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"log_decay": jnp.zeros((B, T, 3))}, "log_decay: expected shape"),
        ({"log_decay": jnp.zeros((B, T, N, F + 1))}, "log_decay: expected shape"),
        ({"log_decay": jnp.zeros((B, T, N), jnp.int32)}, "log_decay: expected a floating"),
        ({"log_decay": jnp.full((B, T, N), 0.1)}, "log_decay: expected values <= 0"),
        ({"log_decay": jnp.full((B, T, N), jnp.nan)}, "log_decay: expected values <= 0"),
        ({"initial_state": jnp.zeros((B, K, F, H))}, "initial_state: expected shape"),
        ({"causal": False}, "causal: expected True"),
        ({"chunk_size": 0}, "chunk_size: expected a whole number"),
        ({"q": jnp.zeros((B, T - 1, N, F))}, "q: expected T=21"),
        ({"implementation": "cudnn"}, "implementation: expected None or one of"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value.replace(":", ""),
)
def test_what_does_not_fit_is_named(qkv, change, words):
    arguments = dict(zip("qkv", qkv, strict=True)) | {"log_decay": jnp.zeros((B, T, N))} | change
    with pytest.raises(ValueError, match=words):
        gated_linear_attention(**arguments)
