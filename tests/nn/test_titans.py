"""Titans' mixers: stability at the defaults, persistent tokens, the leak of MAC, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcattn.nn import (
    MemoryAsContextConfig,
    MemoryAsGateConfig,
    NeuralMemoryConfig,
    PersistentAttentionConfig,
    SoftmaxAttention,
)
from lcattn.nn.persistent_attention import PersistentAttention
from lcattn.ops.merging import merge
from lcattn.testing.conformance.compare import assert_close, assert_finite, assert_zero

WIDTH = 16


def tokens(length, seed=0):
    return jnp.float32(np.random.default_rng(seed).standard_normal((2, length, WIDTH)))


@pytest.mark.parametrize("depth", [2, 4])
def test_training_on_4096_tokens_stays_finite(depth):
    """At default settings, gates wide open or shut, in one row on a single token over and over.

    Published code gives NaN at depth 4, and at 4,096 tokens.
    """
    mixer = NeuralMemoryConfig(width=WIDTH, num_heads=2, depth=depth).make(nnx.Rngs(0))
    graph, parameters = nnx.split(mixer)
    parameters["gates"]["kernel"][...] *= 100
    x = tokens(4096).at[1].set(tokens(1)[1])

    @jax.jit
    def train(parameters):
        def loss(parameters):
            return jnp.mean((nnx.merge(graph, parameters)(x[:, :-1]) - x[:, 1:]) ** 2)

        def step(parameters, _):
            value, slopes = jax.value_and_grad(loss)(parameters)
            signed = jax.tree.map(lambda p, g: p - 0.02 * jnp.sign(g), parameters, slopes)
            return signed, (value, slopes)

        return jax.lax.scan(step, parameters, None, length=4)

    _, (losses, slopes) = train(parameters)
    assert_finite("(losses, gradients)", (losses, slopes))
    assert np.all(slopes["gates"]["bias"][...][0] != 0)  # every gate of every head learns
    assert losses[-1] < losses[0]


def test_defaults_follow_the_chunk_and_the_depth():
    assert NeuralMemoryConfig(depth=1, chunk_size=16).learning_rate == 1 / 32
    assert NeuralMemoryConfig(depth=4).learning_rate == 1 / 512
    assert NeuralMemoryConfig(max_learning_rate=0.5).learning_rate == 0.5
    assert NeuralMemoryConfig(width=32, num_heads=4, depth=3).layer_sizes == (8, 16, 16, 8)


def test_state_size():
    """Weights, momentum and the weights at the start of the chunk, in float32 always."""
    mixer = NeuralMemoryConfig(width=WIDTH, num_heads=2, kernel_size=None).make(nnx.Rngs(0))
    network = 2 * (8 * 16 + 16 * 8)
    assert mixer.state_bytes(10) == mixer.state_bytes(9999) == 4 * (3 * network + 1 + 1)
    assert mixer.state_bytes(10, "bfloat16") == mixer.state_bytes(10)


def test_persistent_tokens_are_keys_before_the_first():
    config = PersistentAttentionConfig(
        width=WIDTH, num_heads=2, window=3, num_persistent=4, position_encoding="nope"
    )
    mixer, x = config.make(nnx.Rngs(0)), tokens(7)
    q, k, v = (np.asarray(heads, np.float64) for heads in mixer.project(x))
    learned = jnp.broadcast_to(mixer.persistent[...], (2, 4, WIDTH))
    _, first_k, first_v = (np.asarray(heads, np.float64) for heads in mixer.project(learned))
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(2, 7, 2):
        recent = slice(max(0, t - 2), t + 1)
        keys = np.concatenate([first_k[b, :, n], k[b, recent, n]])
        weights = np.exp(keys @ q[b, t, n] / np.sqrt(8))
        values = np.concatenate([first_v[b, :, n], v[b, recent, n]])
        out[b, t, n] = weights @ values / weights.sum()
    assert_close("output", mixer(x), mixer.project_out(jnp.float32(out)), 1e-5)


class LiteralContext(PersistentAttention):
    """As printed: every token of a segment sees all of h."""

    def attend_to(self, q, tokens, recalled, **options):
        return merge(
            self._attend_to_persistent(q),
            SoftmaxAttention._attend(self, q, *tokens, return_lse=True, **options),
            SoftmaxAttention._attend(self, q, *recalled, return_lse=True, causal=False),
        )[0]


def test_memory_as_context_leaks_as_printed_and_not_here():
    config = MemoryAsContextConfig(
        width=WIDTH,
        segment_size=4,
        attention=PersistentAttentionConfig(num_heads=2, num_persistent=2, window=None),
        memory=NeuralMemoryConfig(num_heads=2, chunk_size=2, depth=1, kernel_size=None),
    )
    mixer, x = config.make(nnx.Rngs(0)), tokens(8)

    def dependence(mixer):
        graph, parameters = nnx.split(mixer)
        loss = jax.jit(lambda parameters, x: jnp.sum(nnx.merge(graph, parameters)(x)[:, 5] ** 2))
        return jax.grad(loss, argnums=1)(parameters, x)

    strict = dependence(mixer)
    assert_zero("gradient from later tokens", strict[:, 6:])
    assert np.all(np.any(strict[:, :6] != 0, axis=(0, 2)))  # through the memory, segments before
    mixer.attention = LiteralContext(mixer.attention.config, nnx.Rngs(0))
    assert np.any(dependence(mixer)[:, 6:] != 0)


@pytest.mark.usefixtures("no_type_hook")
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: NeuralMemoryConfig(depth=0), "NeuralMemoryConfig.depth: expected 1 to 4 layers"),
        (lambda: NeuralMemoryConfig(depth=5), "NeuralMemoryConfig.depth: expected 1 to 4 layers"),
        (lambda: NeuralMemoryConfig(expansion=0), "expansion: expected a value greater than 0"),
        (lambda: NeuralMemoryConfig(chunk_size=0), "chunk_size: expected a value greater than 0"),
        (lambda: NeuralMemoryConfig(max_learning_rate=0.0), "max_learning_rate: expected a value"),
        (lambda: NeuralMemoryConfig(activation="swish"), "activation: expected"),
        (lambda: PersistentAttentionConfig(num_persistent=0), "num_persistent: expected a value"),
        (lambda: MemoryAsGateConfig(width=20), "num_heads: expected a divisor of width=20"),
        (lambda: MemoryAsContextConfig(segment_size=0), "segment_size: expected a value greater"),
        (lambda: MemoryAsContextConfig(memory=NeuralMemoryConfig()), "memory: expected"),
        (
            lambda: MemoryAsContextConfig(attention=PersistentAttentionConfig(window=4)),
            "attention: expected .*window=None",
        ),
    ],
    ids=["depth-0", "depth-5", "expansion", "chunk", "rate", "activation", "persistent", "heads",
         "segment", "convolution", "window"],
)  # fmt: skip
def test_configs_name_what_does_not_fit(config, words):
    with pytest.raises(ValueError, match=words):
        config()
