"""What a correcting state must do by theory; the suite checks the rest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import ops

from lcattn.ops import gated_delta_rule
from lcattn.ops.triangular import inverse
from lcattn.testing.conformance.compare import assert_close, assert_finite

B, T, N, F, H = 2, 21, 2, 32, 6


def draw(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def qkv():
    return draw(0, B, T, N, F), unit(draw(1, B, T, N, F)), draw(2, B, T, N, H)


@jax.jit
def delta(q, k, v, log_decay=None, beta=None, initial_state=None):
    return ops.gated_delta_rule(
        q, k, v, log_decay, beta, initial_state=initial_state, return_state=True, chunk_size=8,
        scale=1.0,
    )  # fmt: skip


def test_orthonormal_keys_need_no_correction(qkv):
    q, _, v = qkv
    k = jnp.broadcast_to(jnp.eye(F)[None, :T, None], (B, T, N, F))
    expected = ops.linear_attention(q, k, v, feature_map="identity", scale=1.0)
    assert_close("output", delta(q, k, v)[0], expected, 1e-6)


def test_the_parallel_form(qkv):
    """O = tril(Q Kᵀ) (I + tril(b K Kᵀ, -1))^-1 b V."""
    beta = jax.nn.sigmoid(draw(3, B, T, N))
    q, k, v = (np.moveaxis(np.asarray(x, np.float64), 2, 1) for x in qkv)
    strength = np.asarray(beta, np.float64).swapaxes(1, 2)[..., None]
    system = np.eye(T) + np.tril(strength * (k @ k.mT), -1)
    expected = np.tril(q @ k.mT) @ np.linalg.solve(system, strength * v)
    assert_close("output", delta(*qkv, None, beta)[0], np.moveaxis(expected, 1, 2), 2e-6)


def test_one_write_is_recalled_exactly_however_often(qkv):
    _, k, v = (jnp.broadcast_to(x[:, :1], x.shape) for x in qkv)
    out, _ = delta(k, k, v)
    assert_close("recalled", out, v, 1e-6)


def test_strength_2_turns_what_it_finds_into_its_opposite(qkv):
    q, k, v = qkv
    state = draw(4, B, N, F, H)
    twice = jnp.full((B, 1, N), 2.0)
    _, after = delta(q[:, :1], k[:, :1], 0 * v[:, :1], None, twice, state)
    before = jnp.einsum("bnf,bnfh->bnh", k[:, 0], state)
    assert_close("recalled", jnp.einsum("bnf,bnfh->bnh", k[:, 0], after), -before, 2e-6)


def test_without_writes_the_state_only_decays(qkv):
    log_decay, state = -jnp.abs(draw(3, B, T, N)), draw(4, B, N, F, H)
    _, final = delta(*qkv, log_decay, jnp.zeros((B, T, N)), state)
    expected = jnp.exp(log_decay.sum(1))[..., None, None] * state
    assert_close("state", final, expected, 1e-6)


@pytest.mark.parametrize("strength", [-1e3, -np.inf])
def test_the_strongest_decay_leaves_the_current_write(qkv, strength):
    q, k, v = qkv
    inputs = (q, k, v, jnp.full((B, T, N), strength), jnp.ones((B, T, N)), draw(4, B, N, F, H))

    def loss(*inputs):
        out, final = delta(*inputs)
        return (out**2).sum() + (final**2).sum(), out

    (_, out), gradients = jax.value_and_grad(loss, range(6), has_aux=True)(*inputs)
    assert_close("output", out, jnp.einsum("btnf,btnf->btn", q, k)[..., None] * v, 1e-6)
    assert_finite("gradients", gradients)


def test_zero_keys_write_nothing(qkv):
    q, k, v = qkv
    state = draw(4, B, N, F, H)
    out, final = delta(q, 0 * k, v, None, None, state)
    assert_close("state", final, state, 1e-7)
    assert_close("output", out, jnp.einsum("btnf,bnfh->btnh", q, state), 1e-6)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 4e-2)], ids=["float32", "bfloat16"]
)
def test_equal_keys_are_the_worst_case_and_stay_accurate(dtype, tolerance):
    """The triangular system is dense then: each write corrects all before it."""
    length = 128
    q, v = draw(0, 1, length, N, F, dtype=dtype), draw(2, 1, length, N, H, dtype=dtype)
    k = jnp.broadcast_to(unit(draw(1, 1, 1, N, F)), q.shape).astype(dtype)
    beta = jnp.full((1, length, N), 0.9, dtype)
    with jax.enable_x64(True):
        wide = [x.astype("float64") for x in (q, k, v, beta)]
        exact = ops.gated_delta_rule(*wide[:3], beta=wide[3], implementation="reference")
    out = jax.jit(lambda *x: ops.gated_delta_rule(*x[:3], beta=x[3]))(q, k, v, beta)
    assert_close("output", out, exact, tolerance)


def test_chunks_change_nothing(qkv):
    log_decay, beta = -jnp.abs(draw(3, B, T, N)), 2 * jax.nn.sigmoid(draw(5, B, T, N))
    expected = ops.gated_delta_rule(*qkv, log_decay, beta, implementation="reference")
    for chunk_size in (1, 5, 1000):
        run = jax.jit(functools.partial(ops.gated_delta_rule, chunk_size=chunk_size))
        out = run(*qkv, log_decay, beta)
        assert_close(f"chunks of {chunk_size}", out, expected, 2e-6)


def test_the_inverse_and_its_derivative():
    lower = draw(0, 3, 16, 16)
    system = jnp.eye(16) + jnp.tril(lower, -1)
    assert_close("inverse", inverse(lower), np.linalg.inv(np.float64(system)), 1e-5)
    cotangent = draw(1, 3, 16, 16)

    def plain(lower):
        return jnp.linalg.inv(jnp.eye(16) + jnp.tril(lower, -1))

    (found,), (expected,) = (
        jax.vjp(function, 0.3 * lower)[1](cotangent) for function in (inverse, plain)
    )
    assert_close("gradient", found, expected, 1e-4)


def test_nothing_but_the_inputs_is_kept_for_the_gradient(qkv):
    inputs = (*qkv, -jnp.abs(draw(3, B, T, N)), jnp.ones((B, T, N)), draw(4, B, N, F, H))
    _, pull_back = jax.vjp(
        lambda *x: ops.gated_delta_rule(*x[:5], initial_state=x[5], chunk_size=8), *inputs
    )
    kept = sum(x.size for x in jax.tree.leaves(pull_back))
    assert kept <= sum(x.size for x in inputs) + B * T


@pytest.mark.usefixtures("no_type_hook")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"beta": jnp.full((B, T, N), 2.1)}, r"beta: expected values in \[0, 2\], got 2.1"),
        ({"beta": jnp.full((B, T, N), -0.1)}, r"beta: expected values in \[0, 2\]"),
        ({"beta": jnp.full((B, T, N), jnp.nan)}, r"beta: expected values in \[0, 2\], got nan"),
        ({"beta": jnp.zeros((B, T, 3))}, "beta: expected shape"),
        ({"beta": jnp.zeros((B, T, N), jnp.int32)}, "beta: expected a floating"),
        ({"log_decay": jnp.zeros((B, T, N, F))}, "beta: expected shape|log_decay: expected None"),
        ({"log_decay": jnp.full((B, T, N), 0.1)}, "log_decay: expected values <= 0"),
        ({"causal": False}, "causal: expected True"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value.replace(":", ""),
)
def test_what_does_not_fit_is_named(qkv, change, words):
    with pytest.raises(ValueError, match=words):
        gated_delta_rule(**dict(zip("qkv", qkv, strict=True)), **change)
