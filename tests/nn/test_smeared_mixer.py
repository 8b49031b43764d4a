"""What smearing does to keys; streaming and packing are the conformance suite's."""

import jax
import numpy as np
from flax import nnx

from lcattn import nn


def test_without_smear_it_is_plain_attention():
    plain = nn.SoftmaxAttentionConfig(width=8, num_heads=2).make(nnx.Rngs(0))
    smeared = nn.SmearedAttentionConfig(width=8, num_heads=2, smear_init=100.0).make(nnx.Rngs(1))
    nnx.update(smeared, nnx.state(plain))
    x = jax.random.normal(jax.random.key(0), (1, 5, 8))
    np.testing.assert_allclose(smeared(x), plain(x), rtol=1e-6)


def test_half_of_a_key_is_the_key_before():
    mixer = nn.SmearedAttentionConfig(width=8, num_heads=2, position_encoding="nope").make(
        nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(0), (1, 5, 8))
    keys = np.asarray(mixer.project(x)[1])
    q, smeared, v = mixer._all_heads(x, None, None)
    before = np.pad(keys[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
    np.testing.assert_allclose(smeared, (keys + before) / 2, rtol=1e-6)
    assert q.shape == v.shape == keys.shape
