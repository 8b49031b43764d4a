"""HyperAttention as a layer: draws, streams, conversion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcattn.nn import HyperAttentionConfig, SoftmaxAttentionConfig

WIDTH = 16


def make(**fields):
    fields = {"block_size": 4, "sample_size": 3, "min_seq_len": 8} | fields
    return HyperAttentionConfig(width=WIDTH, num_heads=2, **fields).make(nnx.Rngs(0))


@nnx.jit
def call(mixer, x):
    return mixer(x)


def _input(T=20):
    return 10 * jax.random.normal(jax.random.key(1), (1, T, WIDTH))


def _as_softmax(mixer):
    """A softmax layer with the same parameters."""
    softmax = SoftmaxAttentionConfig(width=WIDTH, num_heads=2).make(nnx.Rngs(1))
    nnx.update(softmax, nnx.state(mixer, nnx.Param))
    return softmax


def test_streams_are_exact():
    mixer, x = make(), _input()
    first, state = mixer.extend(x[:, :13], mixer.init_state(1, 20))
    rest, _ = mixer.extend(x[:, 13:], state)
    streamed = jnp.concatenate([first, rest], axis=1)
    np.testing.assert_allclose(streamed, call(_as_softmax(mixer), x), rtol=1e-4, atol=1e-5)
    estimated = call(mixer, x)
    np.testing.assert_allclose(streamed[:, :8], estimated[:, :8], rtol=1e-4, atol=1e-5)
    assert np.abs(streamed - estimated)[:, 8:].max() > 1e-2


def test_a_softmax_layer_can_be_converted():
    mixer = make()
    x = _input(8)
    np.testing.assert_array_equal(call(mixer, x), call(_as_softmax(mixer), x))


def test_training_draws_anew_and_evaluation_does_not():
    mixer, x = make(), _input()
    fixed = call(mixer, x)
    np.testing.assert_array_equal(call(mixer, x), fixed)
    mixer.train()
    drawn = [call(mixer, x), call(mixer, x)]
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3
    mixer.eval()
    np.testing.assert_array_equal(call(mixer, x), fixed)


def test_layers_have_hyperplanes_of_their_own():
    rngs = nnx.Rngs(0)
    config = HyperAttentionConfig(width=WIDTH, num_heads=2)
    one, other = config.make(rngs), config.make(rngs)
    assert one.planes[...].shape == (8, 7)
    assert np.all(one.planes[...] != other.planes[...])
    assert "planes" not in nnx.to_pure_dict(nnx.state(one, nnx.Param))


def test_only_the_strict_form_promises_causality():
    assert make().traits.causal
    published = make(strict=False).traits
    assert not published.causal
    assert published.stochastic
    assert not published.streaming


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sample_size": 0}, "HyperAttentionConfig.sample_size: expected a value greater than 0"),
        ({"block_size": 9}, "HyperAttentionConfig.block_size: expected at most min_seq_len=8"),
        ({"num_projections": 8}, "HyperAttentionConfig.num_projections: expected at most 7, by"),
        ({"min_seq_len": 0}, "HyperAttentionConfig.min_seq_len: expected a value greater than 0"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)
