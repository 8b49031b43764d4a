"""Conversion: the same function where the mechanism promises it, parameters in their places."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcattn.models import LMConfig, convert, converted_config
from lcattn.nn import (
    CoreContextAttentionConfig,
    GatedLinearAttentionConfig,
    HyperAttentionConfig,
    LinearAttentionConfig,
    SelectiveAttentionConfig,
    ShortConvolutionConfig,
    SoftmaxAttentionConfig,
    SoftplusAttentionConfig,
)
from lcattn.testing.conformance.compare import assert_close, assert_identical

T, V = 24, 11
CONFIG = LMConfig(
    vocab_size=V, width=16, num_layers=4, mlp_width=32, init_std=0.3,
    pattern=("conv", "full", "sliding", "full"),
    mixers={
        "conv": ShortConvolutionConfig(),
        "full": SoftmaxAttentionConfig(
            num_heads=4, num_kv_heads=2, qk_norm=True, rope_base=100.0, implementation="xla"
        ),
        "sliding": SoftmaxAttentionConfig(num_heads=2, window=4),
    },
)  # fmt: skip
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V, (2, T)), jnp.int32)


@functools.cache
def trained():
    return CONFIG.make(nnx.Rngs(0))


@nnx.jit
def run(model, tokens):
    return model(tokens)


@functools.cache
def expected():
    return run(trained(), TOKENS)


def converted(mixer, **options):
    return convert(trained(), mixer, rngs=nnx.Rngs(1), **options)


SAME = {
    "selective": SelectiveAttentionConfig(),
    "core context, within its window": CoreContextAttentionConfig(group_size=4, window=T),
    "hyper, up to its least length": HyperAttentionConfig(min_seq_len=T, block_size=4),
    "softmax, within its window": SoftmaxAttentionConfig(window=T),
}
OTHER = {
    "selective, sigmoid": SelectiveAttentionConfig(position="sigmoid"),
    "core context, beyond its window": CoreContextAttentionConfig(group_size=2, window=4),
    "hyper, beyond its least length": HyperAttentionConfig(
        min_seq_len=4, block_size=2, sample_size=2
    ),
    "softmax, beyond its window": SoftmaxAttentionConfig(window=4),
    "softplus": SoftplusAttentionConfig(),
}


@pytest.mark.parametrize("mixer", SAME.values(), ids=SAME)
def test_logits_are_those_of_the_trained_model(mixer):
    model = converted(mixer)
    assert_close("logits", run(model, TOKENS), expected(), 1e-5)
    assert [type(block.mixer.config) for block in model.blocks] == [
        ShortConvolutionConfig, type(mixer), SoftmaxAttentionConfig, type(mixer)
    ]  # fmt: skip


@pytest.mark.parametrize("mixer", OTHER.values(), ids=OTHER)
def test_elsewhere_the_function_changes_and_the_parameters_do_not(mixer):
    model = converted(mixer)
    difference = jnp.abs(run(model, TOKENS) - expected()).max()
    assert 1e-3 < difference < 100
    before = dict(nnx.to_flat_state(nnx.state(trained())))
    after = dict(nnx.to_flat_state(nnx.state(model)))
    for path, parameter in before.items():
        assert_identical(str(path), after[path][...], parameter[...])


def test_a_layer_keeps_its_heads_positions_and_window():
    mixer = SelectiveAttentionConfig(num_heads=8, rope_base=5.0, gate_per_head=False)
    config = converted_config(CONFIG, mixer, (1, 2))
    full, sliding, last = (config.mixer_at(layer) for layer in (1, 2, 3))
    assert (full.num_heads, full.num_kv_heads, full.rope_base, full.qk_norm) == (4, 2, 100, True)
    assert (full.window, full.gate_per_head, full.implementation) == (None, False, None)
    assert (sliding.num_heads, sliding.window, sliding.qk_norm) == (2, 4, False)
    assert last == CONFIG.mixer_at(3)
    assert converted_config(CONFIG, mixer).mixer_at(2) == CONFIG.mixer_at(2)


def test_some_layers_of_one_kind():
    model = converted(SelectiveAttentionConfig(position="sigmoid"), layers=(3,))
    assert type(model.blocks[1].mixer.config) is SoftmaxAttentionConfig
    _, got = model(TOKENS, capture=True)
    _, before = trained()(TOKENS, capture=True)
    assert_close("block 1", got["block_1"], before["block_1"], 1e-6)
    assert jnp.abs(got["block_3"] - before["block_3"]).max() > 1e-3


def test_the_trained_model_is_left_as_it_is():
    before = jax.tree.map(jnp.copy, nnx.state(trained()))
    model = converted(SelectiveAttentionConfig())
    model.blocks[1].mixer.query.kernel[...] += 1
    for old, new in zip(
        jax.tree.leaves(before), jax.tree.leaves(nnx.state(trained())), strict=True
    ):
        assert_identical("parameter", new, old)


def test_new_parameters_follow_the_rngs():
    mixer = SelectiveAttentionConfig(gate_hidden=3)
    weights = [
        convert(trained(), mixer, rngs=nnx.Rngs(seed)).blocks[1].mixer.query_gate.hidden.kernel[...]
        for seed in (1, 1, 2)
    ]
    assert_identical("hidden", weights[0], weights[1])
    assert jnp.abs(weights[0] - weights[2]).max() > 0


ALIBI = CONFIG.replace(
    mixers={**CONFIG.mixers, "full": SoftmaxAttentionConfig(num_heads=4, position_encoding="alibi")}
)
WINDOWS = CONFIG.replace(pattern=("sliding",))


@pytest.mark.parametrize(
    ("config", "mixer", "layers", "message"),
    [
        (CONFIG, ShortConvolutionConfig(), None, "mixer: .* with heads, got ShortConvolution"),
        (CONFIG, SelectiveAttentionConfig(), (4,), r"layers: .* \[0, 4\), got 4"),
        (CONFIG, SelectiveAttentionConfig(), (0,), "layers: .*softmax.*, got layer 0, of ShortC"),
        (CONFIG, CoreContextAttentionConfig(), (2,), "layers: .*no layer with a window.*got 4"),
        (WINDOWS, SelectiveAttentionConfig(), None, "model: .* without a window, got sliding"),
        (ALIBI, CoreContextAttentionConfig(), None, "position_encoding: .*'nope'.*, got 'alibi'"),
        (CONFIG, LinearAttentionConfig(feature_dim=2), None,
         r"mixer: .*a parameter key.kernel \(16, 8\).*\(16, 4\) in LinearAttentionConfig"),
        (CONFIG, LinearAttentionConfig(feature_dim=4), None,
         r"mixer: .*a parameter \w+_norm.scale \(4,\).*no such one"),
        (CONFIG, GatedLinearAttentionConfig(), None, "mixer: .*a parameter .*, got "),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("no_type_hook")
def test_what_cannot_be_converted_is_named(config, mixer, layers, message):
    with pytest.raises(ValueError, match=message):
        converted_config(config, mixer, layers)
