"""Sampling: greedy equals the argmax of full forward passes; options shape the distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcattn.models import LMConfig, generate, sample
from lcattn.nn import LinearAttentionConfig, SoftmaxAttentionConfig

V = 13
PROMPT = jnp.asarray([[1, 2, 3, 4], [5, 6, 7, 8]], jnp.int32)


@pytest.fixture(scope="module")
def model():
    config = LMConfig(
        vocab_size=V, width=16, num_layers=2, mlp_width=0, init_std=1.0,
        pattern=("linear", "full"),
        mixers={
            "linear": LinearAttentionConfig(num_heads=2, feature_dim=4),
            "full": SoftmaxAttentionConfig(num_heads=2),
        },
    )  # fmt: skip
    return config.make(nnx.Rngs(0))


def test_greedy_equals_the_argmax_of_full_passes(model):
    out = generate(model, PROMPT, 6, temperature=0.0)
    assert out.shape == (2, 10)
    assert out.dtype == PROMPT.dtype
    # One full pass over the result scores every step of the loop, since the model is causal.
    logits = nnx.jit(lambda model, tokens: model(tokens))(model, out)
    np.testing.assert_array_equal(out[:, :4], PROMPT)
    np.testing.assert_array_equal(out[:, 4:], jnp.argmax(logits[:, 3:-1], -1))
    np.testing.assert_array_equal(generate(model, PROMPT, 1, temperature=0.0), out[:, :5])


def test_sampling_depends_on_the_key_alone(model):
    first, again, other = (
        generate(model, PROMPT, 6, rng=jax.random.key(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(np.asarray(first) != np.asarray(other))


def test_top_k_of_one_and_a_tiny_top_p_are_greedy(model):
    greedy = generate(model, PROMPT, 6, temperature=0.0)
    rng = jax.random.key(0)
    np.testing.assert_array_equal(generate(model, PROMPT, 6, rng=rng, top_k=1), greedy)
    np.testing.assert_array_equal(generate(model, PROMPT, 6, rng=rng, top_p=1e-6), greedy)


PROBABILITIES = np.array([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PROBABILITIES),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.71}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_p": 0.69}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_k": 3, "top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 0.5}, PROBABILITIES**2 / np.sum(PROBABILITIES**2)),
    ],
)
def test_sampled_frequencies(options, expected):
    draws = 20_000
    logits = jnp.broadcast_to(jnp.log(jnp.float32(PROBABILITIES)), (draws, 4))
    tokens = sample(logits, jax.random.key(0), **options)
    found = np.bincount(tokens, minlength=4) / draws
    np.testing.assert_allclose(found, expected, atol=0.015)
    assert np.all((found == 0) == (np.asarray(expected) == 0))


def test_bad_options_are_named(model, no_type_hook):
    key = jax.random.key(0)
    bad = {
        "num_tokens: expected a whole number": {"num_tokens": 0, "rng": key},
        "temperature: expected a number of at least 0": {"temperature": -1.0, "rng": key},
        "rng: expected a key, unless temperature is 0": {},
        "top_k: expected a whole number": {"top_k": 0, "rng": key},
        "top_p: expected a probability above 0": {"top_p": 0.0, "rng": key},
    }
    for message, options in bad.items():
        with pytest.raises(ValueError, match=message):
            generate(model, PROMPT, **{"num_tokens": 2, **options})
    with pytest.raises(ValueError, match="tokens: expected 2 axes"):
        generate(model, PROMPT[:, :0], 2, temperature=0.0)
