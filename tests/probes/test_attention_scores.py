"""Scores of attention maps made by hand, and the maps of mixers against their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcattn import nn, ops
from lcattn.models import LMConfig
from lcattn.probes import attention, effective_attention
from lcattn.tasks import repeated_tokens

R, COPIES = 5, 3
T = 1 + R * COPIES


@functools.cache
def rows():
    return repeated_tokens(jax.random.key(0), 3, period=R, copies=COPIES, vocab_size=16)


def pattern(place):
    """Attention of reader i to `place(i)` alone, or to all places up to its own."""
    maps = np.zeros((3, 1, T, T), np.float32)
    for i in range(T):
        maps[:, :, i, place(i)] = 1
    return jnp.asarray(maps)


def uniform():
    maps = np.tri(T, dtype=np.float32)
    return jnp.asarray(np.broadcast_to(maps / maps.sum(-1, keepdims=True), (3, 1, T, T)))


def test_heads_made_by_hand():
    induction = pattern(lambda i: i - R + 1 if i > R else i)
    assert attention.prefix_matching(induction, rows()).value == 1
    assert attention.prefix_matching(induction, rows()).count == 3 * R * (COPIES - 1)
    assert attention.previous_token(induction).value == 0
    previous = pattern(lambda i: max(i - 1, 0))
    assert attention.previous_token(previous).value == 1
    assert attention.prefix_matching(previous, rows()).value == 0
    duplicate = pattern(lambda i: i - R if i > R else i)
    assert attention.duplicate_token(duplicate, rows()).value == 1
    # The offset that the paper's wording suggests.
    before = pattern(lambda i: i - R - 1 if i > R else i)
    assert attention.prefix_matching(before, rows(), offset=-1).value == 1
    assert attention.prefix_matching(before, rows()).value == 0


def test_weights_as_shares():
    maps = jnp.array([[[[-2.0, 6.0], [0.0, 0.0]]]])
    np.testing.assert_allclose(attention.as_shares(maps), [[[[0.25, 0.75], [0, 0]]]])
    np.testing.assert_allclose(attention.as_shares(uniform()), uniform(), rtol=1e-6)


def test_of_uniform_attention():
    queries = range(1 + R, T)
    expected = np.mean([((i - 1) // R) / (i + 1) for i in queries])
    np.testing.assert_allclose(
        attention.prefix_matching(uniform(), rows()).value, expected, rtol=1e-6
    )
    np.testing.assert_allclose(
        attention.previous_token(uniform()).value, np.mean(1 / np.arange(2, T + 1)), rtol=1e-6
    )


def test_names_and_order_of_rows_do_not_matter():
    maps = jax.nn.softmax(jax.random.normal(jax.random.key(1), (3, 2, T, T)))
    score = attention.prefix_matching(maps, rows()).value
    names = jax.random.permutation(jax.random.key(2), 16)
    np.testing.assert_allclose(
        attention.prefix_matching(maps, names[rows()]).value, score, atol=1e-6
    )
    np.testing.assert_allclose(
        attention.prefix_matching(maps[::-1], rows()[::-1]).value, score, atol=1e-6
    )


@pytest.mark.parametrize(
    ("tokens", "value", "count"),
    [(np.arange(4), 0.0, 0), (np.full(4, 7), np.mean([1 / 2, 2 / 3, 3 / 4]), 3)],
    ids=["no repeat", "all equal"],
)
def test_edges(tokens, value, count):
    """Where all tokens are equal, every place after an earlier one counts."""
    maps = jnp.asarray(np.tri(4) / np.arange(1, 5)[:, None], jnp.bfloat16)[None, None]
    score = attention.prefix_matching(maps, jnp.asarray(tokens)[None])
    np.testing.assert_allclose(score.value, value, rtol=1e-2)
    assert score.count == count
    assert score.value.dtype == jnp.float32
    assert attention.prefix_matching(0 * maps, jnp.asarray(tokens)[None]).value == 0


def test_maps_are_what_definitions_say():
    """Softmax with grouped heads and a window; linear attention; fixed decay; the delta rule."""
    x = jax.random.normal(jax.random.key(3), (2, 7, 8))
    softmax = nn.SoftmaxAttentionConfig(
        width=8, num_heads=2, num_kv_heads=1, window=3, position_encoding="nope", init_std=0.5
    ).make(nnx.Rngs(0))
    q, k, _ = softmax.project(x)
    scores = jnp.einsum("btnh,bsh->bnts", q, k[:, :, 0]) * 4**-0.5
    seen = np.tri(7, dtype=bool) & ~np.tri(7, k=-3, dtype=bool)
    expected = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    np.testing.assert_allclose(jax.jit(softmax.attention_map)(x), expected, atol=1e-6)

    linear = nn.LinearAttentionConfig(
        width=8, num_heads=2, feature_dim=3, feature_map="elu", init_std=0.5
    ).make(nnx.Rngs(0))
    q, k, _ = (1 + jax.nn.elu(h) for h in linear.project(x))
    weights = jnp.einsum("btnf,bsnf->bnts", q, k) * np.tri(7)
    expected = weights / weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(jax.jit(linear.attention_map)(x), expected, atol=1e-5)

    retention = nn.RetentionConfig(
        width=8, num_heads=2, feature_dim=4, position_encoding="nope", init_std=0.5
    ).make(nnx.Rngs(0))
    q, k, _ = retention.project(x)
    distance = np.arange(7)[:, None] - np.arange(7)
    decay = (1 - 2.0 ** -(5 + np.arange(2)))[:, None, None] ** np.maximum(distance, 0)
    expected = jnp.einsum("btnf,bsnf->bnts", q, k) * 4**-0.5 * decay * np.tri(7)
    np.testing.assert_allclose(jax.jit(retention.attention_map)(x), expected, atol=1e-5)


def test_one_vjp_a_reader_gives_the_same_map():
    keys = jax.random.split(jax.random.key(4), 3)
    q, k, v = (jax.random.normal(key, (1, 6, 2, 3)) for key in keys)
    beta = jnp.full((1, 6, 2), 0.7)

    def read(v):
        return ops.gated_delta_rule(q, k / 2, v, None, beta)

    places = jnp.broadcast_to(jnp.eye(6)[None, :, None], (1, 6, 2, 6))
    both = jax.jit(lambda v, places: (effective_attention(read, v), read(places).swapaxes(1, 2)))
    found, expected = both(v, places)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@functools.cache
def copier(gain=1.0):
    """A model whose only head brings tokens as they are."""
    config = LMConfig(
        vocab_size=16, width=16, num_layers=1, pattern=("a",), mlp_width=0,
        mixers={"a": nn.SoftmaxAttentionConfig(num_heads=1, position_encoding="nope")},
    )  # fmt: skip
    model = config.make(nnx.Rngs(0))
    model.embedding.embedding[...] = jnp.eye(16)
    model.blocks[0].mixer.value.kernel[...] = jnp.eye(16)
    model.blocks[0].mixer.out.kernel[...] = gain * jnp.eye(16)
    return model


def test_copying_heads_raise_what_they_read():
    np.testing.assert_allclose(attention.copying(copier(), rows()[:, 1 : R + 1])[0], 1, atol=1e-5)
    np.testing.assert_allclose(
        attention.copying(copier(-1.0), rows()[:, 1 : R + 1])[0], -1, atol=1e-5
    )


def test_composition_of_keys_is_found():
    """A head whose keys read what another one writes, and one whose keys do not."""
    config = LMConfig(
        vocab_size=8, width=16, num_layers=2, pattern=("a",), mlp_width=0,
        mixers={"a": nn.SoftmaxAttentionConfig(num_heads=2, position_encoding="nope")},
    )  # fmt: skip
    model = config.make(nnx.Rngs(0))
    first, second = (block.mixer for block in model.blocks)
    token, written = jnp.eye(16)[:, :8], jnp.eye(16)[:, 8:]  # two halves of the stream
    model.embedding.embedding[...] = token.T
    nothing = jnp.zeros((16, 8))
    first.value.kernel[...] = jnp.concatenate([token, nothing], axis=1)
    first.out.kernel[...] = jnp.concatenate([written.T, nothing.T])
    second.query.kernel[...] = jnp.concatenate([token, token], axis=1)
    second.key.kernel[...] = jnp.concatenate([token, written], axis=1)
    # early head 0 writes; late head 1 reads that.
    np.testing.assert_allclose(attention.k_composition(model, 0, 1), [[0, 8], [0, 0]], atol=1e-5)
    with pytest.raises(ValueError, match="early, late"):
        attention.k_composition(model, 1, 1)
