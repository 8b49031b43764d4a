"""Gated linear attention, the delta rule and prefix linear attention: defaults, sizes, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcattn.nn import (
    DeltaNetConfig,
    GatedDeltaNetConfig,
    GatedLinearAttentionConfig,
    PrefixLinearAttentionConfig,
    RetentionConfig,
)
from lcattn.nn.layers import unit_norm
from lcattn.testing.conformance.compare import assert_close, assert_finite, assert_zero

WIDTH = 32


def make(config):
    return config.replace(width=WIDTH).make(nnx.Rngs(0))


def tokens(length, seed=0):
    return jnp.float32(np.random.default_rng(seed).standard_normal((2, length, WIDTH)))


@pytest.mark.parametrize(
    ("config", "query", "value", "gated"),
    [
        (GatedLinearAttentionConfig(width=2048), 1024, 2048, True),
        (RetentionConfig(width=2048), 2048, 4096, True),
        (GatedDeltaNetConfig(width=2048), 6 * 256, 6 * 512, True),
        (DeltaNetConfig(width=2048), 2048, 2048, False),
    ],
)
def test_published_sizes(config, query, value, gated):
    mixer = nnx.eval_shape(lambda: config.make(nnx.Rngs(0)))
    assert mixer.query.kernel.shape == mixer.key.kernel.shape == (2048, query)
    assert mixer.value.kernel.shape == (2048, value)
    assert mixer.out.kernel.shape == (value, 2048)
    assert hasattr(mixer, "gate") == gated


def test_state_sizes():
    gla = make(GatedLinearAttentionConfig(num_heads=4, num_kv_heads=2))
    assert gla.state_bytes(10) == gla.state_bytes(1000) == 4 * 2 * 4 * 8 + 4
    assert gla.state_bytes(10, "bfloat16") == gla.state_bytes(10)  # sums stay in float32
    delta = make(DeltaNetConfig(num_heads=4))
    assert delta.state_bytes(10) == 4 * (4 * 8 * 8 + 3 * 3 * WIDTH) + 4


def test_decays_of_gated_delta_net_start_as_published():
    """exp(A_log) in (0, 16), softplus(dt_bias) in [1e-3, 0.1], in vectors: not weight-decayed."""
    mixer = make(GatedDeltaNetConfig(num_heads=64, head_dim=2, feature_dim=2))
    rates, steps = np.exp(mixer.A_log[...]), jax.nn.softplus(mixer.dt_bias[...])
    assert rates.shape == steps.shape == (64,)
    assert 0 < rates.min() < 4
    assert 12 < rates.max() < 16
    assert 1e-3 <= steps.min() < 2e-3
    assert 0.05 < steps.max() <= 0.1


def test_retention_forgets_at_published_rates():
    """Unrolled by hand: 1 - 2^-5, 1 - 2^-6 ... a token, one a head."""
    mixer = make(RetentionConfig(num_heads=2))
    x = tokens(1)
    _, once = mixer.extend(x, mixer.init_state(2, 8))
    nothing = jnp.zeros_like(x)
    _, twice = mixer.extend(nothing, once)
    ratio = twice.memory / once.memory
    assert_close("ratio", ratio[:, 0], np.full(ratio[:, 0].shape, 1 - 1 / 32), 1e-6)
    assert_close("ratio", ratio[:, 1], np.full(ratio[:, 1].shape, 1 - 1 / 64), 1e-6)


def test_strong_gates_are_finite():
    """In-chunk decays of e^-1000 and more, where e^G e^-G would overflow."""
    mixer = make(GatedLinearAttentionConfig(num_heads=4, gate_divisor=1e-3))
    graph, parameters = nnx.split(mixer)

    def loss(parameters):
        return (nnx.merge(graph, parameters)(tokens(70)) ** 2).sum()

    assert_finite("loss, gradients", jax.jit(jax.value_and_grad(loss))(parameters))


def test_unit_norm_of_zero_is_zero_with_a_finite_slope():
    x = jnp.zeros((3, 8)).at[0].set(5.0)
    assert_close("norm", jnp.linalg.norm(unit_norm(x), axis=-1), np.array([1, 0, 0]), 1e-6)
    assert_finite("slope", jax.grad(lambda x: unit_norm(x).sum())(x))


@pytest.mark.usefixtures("no_type_hook")
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: GatedDeltaNetConfig(width=20), "num_heads: expected a divisor of 0.75 . width=20"),
        (lambda: GatedLinearAttentionConfig(width=4), "num_heads: expected a divisor of 0.5"),
        (lambda: GatedLinearAttentionConfig(decay="token"), "decay: expected"),
        (lambda: GatedLinearAttentionConfig(gate_divisor=0.0), "gate_divisor: expected a value gr"),
        (lambda: RetentionConfig(width=8), "position_encoding: expected 'nope', or an even F"),
        (lambda: GatedDeltaNetConfig(kernel_size=0), "kernel_size: expected a value greater"),
        (lambda: PrefixLinearAttentionConfig(prefix_length=0), "prefix_length: expected a value"),
    ],
    ids=["delta", "key-share", "decay", "divisor", "odd-rotary", "kernel", "prefix"],
)
def test_configs_name_what_does_not_fit(config, words):
    with pytest.raises(ValueError, match=words):
        config()


PREFIX = PrefixLinearAttentionConfig(
    width=WIDTH, num_heads=4, feature_dim=4, chunk_size=8, prefix_length=6
)


@pytest.fixture(scope="module")
def prefix():
    return PREFIX.make(nnx.Rngs(0))


def test_a_prefix_streams_if_the_first_call_brings_it(prefix):
    x = tokens(19)
    whole = prefix(x)
    for first in (6, 7, 19):
        out, state, end = [], prefix.init_state(2, 19), 0
        for length in (first, 1, 5, 19 - first - 6):
            if end < 19:
                y, state = prefix.extend(x[:, end : end + length], state)
                out.append(y)
                end += length
        assert_close(f"first call of {first}", jnp.concatenate(out, axis=1), whole[:, :end], 1e-5)
    early, _ = prefix.extend(x[:, :3], prefix.init_state(2, 19))
    assert_close("a prefix of three", early, prefix(x[:, :3]), 1e-5)
    assert np.max(np.abs(early - whole[:, :3])) > 1e-4  # hence traits.streaming is False


def test_a_prefix_is_seen_both_ways_and_the_rest_is_causal(prefix):
    def dependence(t):
        return jax.grad(lambda x: (prefix(x)[:, t] ** 2).sum())(tokens(19))

    within = np.any(np.asarray(dependence(1)) != 0, axis=(0, 2))
    assert np.array_equal(np.flatnonzero(within), np.arange(6))
    assert_zero("gradient towards the future", dependence(8)[:, 9:])


def test_documents_shorter_than_the_prefix(prefix):
    x = tokens(12)
    ids = jnp.repeat(jnp.arange(3), jnp.array([2, 1, 9]), total_repeat_length=12)
    packed = prefix(x, jnp.broadcast_to(ids, (2, 12)).astype(jnp.int32))
    for start, end in ((0, 2), (2, 3), (3, 12)):
        assert_close(f"document at {start}", packed[:, start:end], prefix(x[:, start:end]), 1e-5)
