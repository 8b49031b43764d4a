"""The short convolution beyond the shared suite."""

import jax.numpy as jnp
import numpy as np
import pytest
from compiled import ops

B, T, D, W = 2, 9, 3, 4


def test_it_is_a_correlation_with_the_last_tap_on_the_token_itself():
    x = np.random.default_rng(0).standard_normal((1, T, 1))
    taps = np.random.default_rng(1).standard_normal((1, W))
    y = ops.short_convolution(jnp.float32(x), jnp.float32(taps))
    expected = np.convolve(x[0, :, 0], taps[0, ::-1])[:T]
    np.testing.assert_allclose(y[0, :, 0], expected, rtol=1e-5)


def test_the_state_is_the_last_inputs_of_the_last_document():
    x = jnp.arange(1.0, B * T * D + 1).reshape(B, T, D)
    weight = jnp.ones((D, W))
    _, state = ops.short_convolution(x, weight, return_state=True)
    np.testing.assert_array_equal(state, x[:, T - W + 1 :])
    ids = jnp.asarray([[0] * 7 + [1] * 2, [0] * 9], jnp.int32)
    _, state = ops.short_convolution(x, weight, segment_ids=ids, return_state=True)
    np.testing.assert_array_equal(state[0, :1], 0)
    np.testing.assert_array_equal(state[0, 1:], x[0, -2:])


def test_bad_arguments_are_named(no_type_hook):
    x, weight = jnp.zeros((B, T, D)), jnp.zeros((D, W))
    bad = {
        "x: expected 3 axes": (x[0], weight, {}),
        "x: expected a floating-point": (x.astype(int), weight, {}),
        "weight: expected shape": (x, weight[:2], {}),
        "segment_ids: expected shape": (x, weight, {"segment_ids": jnp.zeros((B, 2), jnp.int32)}),
        "initial_state: expected shape": (x, weight, {"initial_state": x}),
        "implementation: expected": (x, weight, {"implementation": "fast"}),
    }
    for message, (inputs, taps, options) in bad.items():
        with pytest.raises(ValueError, match=message):
            ops.short_convolution(inputs, taps, **options)
    with pytest.raises(ValueError, match="x: expected 3 axes"):
        ops.short_convolution(x[:, :0], weight)
