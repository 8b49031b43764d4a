"""Behavioural probes and ablations, on models whose answers are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcattn import nn, probes
from lcattn.models import LMConfig
from lcattn.tasks import repeated_tokens

VOCAB, R = 40, 5


@functools.cache
def rows():
    with jax.ensure_compile_time_eval():  # The first to ask may be a function that is being traced.
        return repeated_tokens(jax.random.key(0), 6, period=R, copies=2, vocab_size=VOCAB)


def copier(tokens):
    """Answers with what followed the first earlier copy of the query; knows nothing else."""
    T = tokens.shape[1]
    match = (tokens[:, :, None] == tokens[:, None]) & np.tri(T, k=-1, dtype=bool)
    answer = jnp.take_along_axis(tokens, match.argmax(axis=-1) + 1, axis=1)
    return 30 * jax.nn.one_hot(answer, VOCAB) * match.any(axis=-1)[..., None]


def bigrams(tokens):
    """A table: each token is followed by the next number, whatever the context says."""
    return 30 * jax.nn.one_hot((tokens + 1) % VOCAB, VOCAB)


@functools.cache
def model(mixer=None):
    mixer = mixer or nn.SoftmaxAttentionConfig(num_heads=2)
    config = LMConfig(
        vocab_size=VOCAB, width=8, num_layers=2, pattern=("a",), mlp_width=8,
        mixers={"a": mixer}, init_std=0.5,
    )  # fmt: skip
    return config.make(nnx.Rngs(0))


@pytest.mark.parametrize(("score", "copied"), [(copier, 1), (bigrams, 0)])
def test_counterfactual_copy(score, copied):
    probe = functools.partial(
        probes.counterfactual_copy, score, jax.random.key(1), period=R, vocab_size=VOCAB
    )
    result = probe(rows())
    if copied:
        np.testing.assert_allclose(result, [1, 0], atol=1e-6)
    else:  # The next number is the replacement now and then, on average once in V - 1.
        many = jax.jit(
            jax.vmap(
                lambda key: (
                    probes.counterfactual_copy(score, key, rows(), R, vocab_size=VOCAB).copied
                )
            )
        )(jax.random.split(jax.random.key(2), 200))
        assert many.mean() == pytest.approx(1 / (VOCAB - 2), abs=0.02)
    with pytest.raises(ValueError, match="period: expected 2 or more, and two copies in 11 tokens"):
        probes.counterfactual_copy(score, jax.random.key(1), rows(), R + 1, vocab_size=VOCAB)


def test_occlusion_tells_source_and_match_apart():
    drops = jax.jit(lambda: probes.occlusion(copier, jax.random.key(1), rows(), vocab_size=VOCAB))()
    roles = probes.by_role(drops, R)
    assert roles.source > 20
    assert roles.query > 2
    assert roles.match > 2  # the log of the vocabulary: nothing is known any more
    assert roles.other < 1  # a replacement may look like the query
    assert not np.triu(drops, k=1).any()


def test_gradients_are_shares():
    whole = model()
    shares = jax.jit(lambda: probes.gradient_shares(whole, rows()))()
    for share in shares:
        np.testing.assert_allclose(share.sum(axis=-1), 1, rtol=1e-5)
        assert not np.triu(share, k=1).any()


def test_finite_differences_find_the_jacobian():
    config = nn.SoftmaxAttentionConfig(width=4, num_heads=1, init_std=0.5)
    mixer = config.make(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 5, 4))
    jacobian = jax.jit(jax.jacobian(lambda x: mixer(x)[0]))(x)[:, :, 0]  # [out, D, in, D]
    norm = jnp.sqrt((jacobian**2).sum(axis=(1, 3)) / 4)
    moves = jax.vmap(lambda key: probes.sensitivity(mixer, x, key, delta=1e-2) ** 2)
    moved = jax.jit(moves)(jax.random.split(jax.random.key(1), 300))
    # A random unit direction sees the Frobenius norm over the square root of the size.
    np.testing.assert_allclose(jnp.sqrt(moved.mean(axis=0)), norm, rtol=0.15, atol=1e-4)


def test_a_head_without_output_is_not_missed():
    whole = model()
    mute = nnx.clone(whole)
    out = mute.blocks[0].mixer.out.kernel
    out[...] = out[...].at[4:].set(0)  # head 1 of the first layer
    patterns = jax.jit(lambda: probes.attention_maps(whole, rows()))()
    graph, weights, mute_weights = *nnx.split(whole), nnx.state(mute)

    @jax.jit
    def run(weights, kept):
        model, kept = nnx.merge(graph, weights), {0: kept}
        held = probes.with_patterns(model, rows(), patterns, kept)
        return model(rows()), probes.keep_heads(model, kept)(rows()), held

    both, first = jnp.ones(2), jnp.array([1.0, 0.0])
    plain, kept, held = run(weights, both)
    np.testing.assert_array_equal(kept, plain)
    np.testing.assert_allclose(held, plain, atol=1e-5)
    muted, kept, held = run(mute_weights, first)
    np.testing.assert_array_equal(kept, muted)
    np.testing.assert_array_equal(held, run(mute_weights, both)[2])
    # Of a head that is used, the later layer's attention changes too, unless it is held.
    _, kept, held = run(weights, first)
    np.testing.assert_array_equal(kept, muted)
    assert jnp.abs(held - muted).max() > 1e-3


def test_ablations_name_what_they_cannot_do():
    with pytest.raises(ValueError, match="layer: expected 0 to 1, got 2"):
        probes.keep_heads(model(), {2: jnp.ones(2)})
    with pytest.raises(ValueError, match="layer 0: expected 2 heads"):
        probes.keep_heads(model(), {0: jnp.ones(3)})
    with pytest.raises(ValueError, match="layer 0: expected a mixer with heads"):
        probes.keep_heads(model(nn.ShortConvolutionConfig()), {0: jnp.ones(2)})


def test_retrieval_scores_by_hand():
    """Prompt `. 7 8 9 . ?`, generated `7 8 5`; a copying head, one late by a token, an idle one."""
    tokens = jnp.array([[1, 7, 8, 9, 1, 2, 7, 8, 5]] * 2)
    needle = jnp.zeros((2, 9), bool).at[:, 1:4].set(True)
    maps = np.zeros((2, 3, 9, 9), np.float32)
    for head, places in enumerate([(1, 2, 3), (2, 3, 3), (0, 0, 0)]):
        for reader, place in zip((5, 6, 7), places, strict=True):
            maps[:, head, reader, place] = 1
    score = functools.partial(
        probes.retrieval_scores, jnp.asarray(maps), tokens, prompt_length=6, needle=needle
    )
    np.testing.assert_allclose(score(), [2 / 3, 0, 0])
    np.testing.assert_array_equal(score(counted=jnp.zeros(2, bool)), 0)
    with pytest.raises(ValueError, match="prompt_length"):
        probes.retrieval_scores(jnp.asarray(maps), tokens, prompt_length=9, needle=needle)


def test_which_heads_are_masked():
    scores = jnp.array([[0.1, 0.9], [0.5, 0.0]])
    np.testing.assert_array_equal(probes.best_heads(scores, 2), [[1, 0], [0, 1]])
    for seed in range(5):
        kept = probes.random_heads(jax.random.key(seed), scores, 2, spared=2)
        np.testing.assert_array_equal(kept, [[0, 1], [1, 0]])
    with pytest.raises(ValueError, match="count: expected at most 2 heads"):
        probes.random_heads(jax.random.key(0), scores, 3, spared=2)
