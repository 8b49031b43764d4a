"""What the shared suite does not say about the mixers: defaults, sizes, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcattn.nn import (
    GatedDeltaNetConfig,
    HyperAttentionConfig,
    LinearAttentionConfig,
    MemoryAsContextConfig,
    RoutingAttentionConfig,
    ShortConvolutionConfig,
    SoftmaxAttentionConfig,
    SoftplusAttentionConfig,
)
from lcattn.nn.layers import rms_norm
from lcattn.nn.mixer import default_positions

WIDTH = 32


def make(config):
    return config.replace(width=WIDTH).make(nnx.Rngs(0))


def test_state_sizes():
    full = make(SoftmaxAttentionConfig(num_heads=4, num_kv_heads=2))
    assert full.state_bytes(100) == 2 * 100 * 2 * 8 * 4 + 4
    assert full.state_bytes(100, "bfloat16") == 2 * 100 * 2 * 8 * 2 + 4
    sliding = make(SoftmaxAttentionConfig(num_heads=4, window=16))
    assert sliding.state_bytes(100) == sliding.state_bytes(10_000) == 2 * 16 * 32 * 4 + 4
    linear = make(LinearAttentionConfig(num_heads=4, feature_dim=16))
    assert linear.state_bytes(100) == linear.state_bytes(10_000) == 4 * 153 * (8 + 1) * 4
    assert linear.state_bytes(100, "bfloat16") == linear.state_bytes(100)  # float32 all the same
    convolution = make(ShortConvolutionConfig(kernel_size=3))
    assert convolution.state_bytes(100) == 2 * (2 * WIDTH) * 4


def test_rms_norms_are_those_of_flax():
    ours = rms_norm(WIDTH, dtype="float32", rngs=nnx.Rngs(0))
    theirs = nnx.RMSNorm(WIDTH, epsilon=1e-5, rngs=nnx.Rngs(0))
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(ours))) == {"scale": (WIDTH,)}
    scale = jax.random.normal(jax.random.key(0), (WIDTH,))
    for norm in (ours, theirs):
        nnx.update(norm, {"scale": scale})
    x = 3 * jax.random.normal(jax.random.key(1), (2, 5, WIDTH))
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-6)


def test_unnormalised_outputs_get_a_norm_by_default():
    assert make(LinearAttentionConfig(num_heads=4)).norm is None
    assert make(LinearAttentionConfig(num_heads=4, feature_map="identity")).norm is not None
    assert make(LinearAttentionConfig(num_heads=4, normalize=False)).norm is not None
    assert make(LinearAttentionConfig(num_heads=4, normalize=False, output_norm=False)).norm is None


def test_positions_restart_in_every_document():
    # Rotary and ALiBi scores depend on differences only, so outputs cannot tell.
    x, ids = jnp.zeros((1, 5, WIDTH)), jnp.asarray([[0, 0, 3, 3, 3]], jnp.int32)
    assert default_positions(x, ids).tolist() == [[0, 1, 0, 1, 2]]
    assert default_positions(x, None).tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    "config",
    [
        SoftmaxAttentionConfig(num_heads=4),
        LinearAttentionConfig(num_heads=4),
        ShortConvolutionConfig(),
    ],
)
def test_extend_names_bad_arguments(no_type_hook, config):
    mixer = make(config)
    state = mixer.init_state(2, 8)
    for x in (jnp.zeros((2, WIDTH)), jnp.zeros((2, 0, WIDTH))):
        with pytest.raises(ValueError, match="x: expected 3 axes"):
            mixer.extend(x, state)
    with pytest.raises(ValueError, match="state: expected B=1 streams, as in x, got B=2"):
        mixer.extend(jnp.zeros((1, 3, WIDTH)), state)


@pytest.mark.parametrize(
    "config",
    [
        SoftmaxAttentionConfig(num_heads=4),
        GatedDeltaNetConfig(num_heads=4, feature_dim=8, head_dim=8),
        ShortConvolutionConfig(),
    ],
)
def test_calls_name_bad_arguments(no_type_hook, config):
    mixer = make(config)
    for x in (jnp.zeros((8, WIDTH)), jnp.zeros((2, 8, WIDTH + 1))):
        with pytest.raises(ValueError, match=rf"x: expected shape \[B,T,D\] with D={WIDTH}"):
            mixer(x)
    with pytest.raises(ValueError, match="x: expected a floating-point dtype, got int32"):
        mixer(jnp.zeros((2, 8, WIDTH), int))
    for ids in (jnp.zeros((2, 7), int), jnp.zeros(8, int)):
        with pytest.raises(ValueError, match=r"segment_ids: expected shape \[B,T\]"):
            mixer(jnp.zeros((2, 8, WIDTH)), ids)


@pytest.mark.parametrize(
    "config",
    [
        HyperAttentionConfig(num_heads=4, min_seq_len=8, block_size=4),
        MemoryAsContextConfig(),
        RoutingAttentionConfig(num_heads=4),
        SoftplusAttentionConfig(num_heads=4, power=3.0),
    ],
)
def test_a_batch_may_be_empty(config):
    ids = jnp.zeros((0, 20), int)
    out = jax.eval_shape(make(config), jnp.zeros((0, 20, WIDTH)), ids)
    assert out.shape == (0, 20, WIDTH)


def test_more_tokens_than_the_cache_has_slots():
    mixer = make(SoftmaxAttentionConfig(num_heads=4))
    with pytest.raises(ValueError, match=r"state: expected room for 9 tokens, got max_length=8"):
        mixer.extend(jnp.zeros((2, 9, WIDTH)), mixer.init_state(2, 8))
    with pytest.raises(ValueError, match="x: expected at most max_length=8 tokens"):
        jax.eval_shape(mixer.extend, jnp.zeros((2, 9, WIDTH)), mixer.init_state(2, 8))


def test_an_implementation_that_cannot_run_says_so():
    mixer = make(SoftmaxAttentionConfig(num_heads=4, implementation="cudnn"))
    with pytest.raises(ValueError, match="softmax_attention: implementation 'cudnn' needs a GPU"):
        mixer(jnp.zeros((1, 4, WIDTH)))
