"""The published form of agent attention for images, and the limits of the causal one."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcattn import nn, ops

PUBLISHED = {
    "causal": False, "agents": "pooled", "num_agents": 4, "grid": (3, 5), "bias_size": 7,
}  # fmt: skip


def _make(**fields):
    return nn.AgentAttentionConfig(width=16, num_heads=4, **fields).make(nnx.Rngs(0))


def _input(length=15):
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, length, 16)), jnp.float32)


def test_published_form_on_a_grid_that_is_no_square():
    mixer, x = _make(**PUBLISHED, init_std=0.3), _input()
    q, k, v = mixer.project(x)
    heads = ops.agent_attention(
        q, k, v, ops.pooled_agents(q, (2, 2), grid=(3, 5)),
        causal=False, key_bias=mixer.key_bias(), query_bias=mixer.query_bias().mT,
        implementation="reference",
    )  # fmt: skip
    image = np.pad(np.asarray(v).reshape(2, 3, 5, 16), ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = np.asarray(mixer.taps[...]).reshape(16, 3, 3)
    convolved = sum(
        taps[:, i, j] * image[:, i : i + 3, j : j + 5] for i in range(3) for j in range(3)
    )
    expected = mixer.out(heads.reshape(2, 15, 16) + convolved.reshape(2, 15, 16))
    np.testing.assert_allclose(mixer(x), expected, rtol=1e-4, atol=1e-5)


def test_biases_add_a_coarse_map_rows_and_columns():
    bias = _make(**PUBLISHED).key_bias
    assert bias().shape == (4, 4, 15)
    bias.coarse[...] = jnp.full((4, 4, 7, 7), 2.0)
    bias.rows[...] = jnp.broadcast_to(jnp.arange(3.0)[:, None], (4, 4, 3, 1))
    bias.columns[...] = jnp.broadcast_to(10 * jnp.arange(5.0), (4, 4, 1, 5))
    expected = 2 + np.arange(3)[:, None] + 10 * np.arange(5)
    np.testing.assert_allclose(bias()[1, 2].reshape(3, 5), expected, rtol=1e-6)


def test_a_centred_convolution_on_a_line():
    mixer, x = _make(causal=False, kernel_size=3), _input(6)
    mixer.taps[...] = jnp.broadcast_to(jnp.asarray([1.0, 0.0, 10.0]), (16, 3))
    v = mixer.value(x)
    padded = np.pad(v, ((0, 0), (1, 1), (0, 0)))
    np.testing.assert_allclose(
        mixer._convolve(mixer.project(x)[2], None), padded[:, :-2] + 10 * padded[:, 2:], rtol=1e-5
    )


def test_what_is_not_causal_does_not_stream_or_pack():
    mixer = _make(**PUBLISHED)
    assert not mixer.traits.causal
    assert not mixer.traits.streaming
    with pytest.raises(ValueError, match="causal: expected True to stream"):
        mixer.init_state(1, 8)
    with pytest.raises(ValueError, match="segment_ids: expected None with pooled agents"):
        mixer(_input(), jnp.zeros((2, 15), jnp.int32))
    with pytest.raises(ValueError, match=r"x: expected T tokens of the grid \(3, 5\)"):
        mixer(_input(14))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"agents": "pooled"}, "agents: expected 'learned' where causal"),
        ({"grid": (3, 5)}, "grid: expected None where causal"),
        ({"num_agents": 0}, "num_agents: expected a value greater than 0"),
        ({**PUBLISHED, "num_agents": 5}, "num_agents: expected a square"),
        ({**PUBLISHED, "kernel_size": 4}, "kernel_size: expected an odd number"),
        ({"causal": False, "bias_size": 7}, "bias_size: expected None without a grid"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        _make(**fields)
