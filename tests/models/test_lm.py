"""The language model: streaming, packing, intermediates, remat, dropout, precision, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcattn.models import LMConfig
from lcattn.nn import LinearAttentionConfig, ShortConvolutionConfig, SoftmaxAttentionConfig
from lcattn.testing.conformance.compare import assert_close, assert_identical

B, T, V = 2, 14, 11
CONFIG = LMConfig(
    vocab_size=V, width=16, num_layers=3, mlp_width=32, init_std=0.3,
    pattern=("conv", "linear", "sliding"),
    mixers={
        "conv": ShortConvolutionConfig(),
        "linear": LinearAttentionConfig(num_heads=2, feature_dim=4),
        "sliding": SoftmaxAttentionConfig(num_heads=2, window=4),
    },
)  # fmt: skip
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, T)), jnp.int32)


@functools.cache
def build(**changes):
    return CONFIG.replace(**changes).make(nnx.Rngs(0))


@nnx.jit
def run(model, *args, **kwargs):
    return model(*args, **kwargs)


@nnx.jit
def extend(model, tokens, state):
    return model.extend(tokens, state)


@nnx.jit
def gradient(model, tokens):
    return nnx.grad(lambda model: jnp.sum(jax.nn.log_softmax(model(tokens))[..., 0]))(model)


@pytest.mark.parametrize("lengths", [(T,), (5, 1, 1, 7), (1, 13)])
def test_however_tokens_are_cut_the_logits_are_the_same(lengths):
    model = build()
    state, logits, start = model.init_state(B, T), [], 0
    for length in lengths:
        out, state = extend(model, TOKENS[:, start : start + length], state)
        logits.append(out)
        start += length
    assert_close("logits", jnp.concatenate(logits, 1), run(model, TOKENS), 1e-5)


def test_packed_documents_equal_documents_apart():
    model = build()
    ids = jnp.asarray([[0] * 5 + [1] * 9, [3] * 5 + [7] * 9], jnp.int32)
    packed = run(model, TOKENS, ids)
    apart = jnp.concatenate([run(model, TOKENS[:, :5]), run(model, TOKENS[:, 5:])], axis=1)
    assert_close("logits", packed, apart, 1e-5)


def test_logits_are_float32_and_causal():
    logits = run(build(), TOKENS)
    assert logits.shape == (B, T, V)
    assert logits.dtype == jnp.float32
    changed = run(build(), TOKENS.at[:, 6:].add(1) % V)
    assert_identical("logits before token 6", changed[:, :6], logits[:, :6])


def test_capture_names_what_each_part_adds():
    logits, captured = nnx.jit(lambda model, x: model(x, capture=True))(build(), TOKENS)
    names = {"embedding", "norm"} | {
        f"block_{i}{part}" for i in range(3) for part in ("", "/mixer", "/mlp")
    }
    assert set(captured) == names
    assert_close("logits", logits, run(build(), TOKENS), 1e-6)
    stream = captured["embedding"]
    for i in range(3):
        stream = stream + captured[f"block_{i}/mixer"] + captured[f"block_{i}/mlp"]
        assert_close(f"block_{i}", captured[f"block_{i}"], stream, 1e-5)


def test_remat_changes_no_gradient():
    expected = nnx.state(gradient(build(), TOKENS))
    found = nnx.state(gradient(build(remat=True), TOKENS))
    assert_close("gradient of ", nnx.to_pure_dict(found), nnx.to_pure_dict(expected), 1e-5)


def test_every_parameter_gets_a_gradient_and_names_its_axes():
    for path, leaf in nnx.to_flat_state(nnx.state(gradient(build(), TOKENS))):
        assert np.any(leaf[...] != 0), path
    for path, parameter in nnx.to_flat_state(nnx.state(build(), nnx.Param)):
        assert len(parameter.get_metadata("axes")) == parameter.ndim, path


def test_dropout_acts_only_with_a_key():
    model = build(dropout=0.5)
    call = nnx.jit(lambda model, x, rng: model(x, rng=rng, capture=True))
    assert_close("logits", run(model, TOKENS), run(build(), TOKENS), 1e-6)
    _, captured = call(model, TOKENS, jax.random.key(0))
    kept = captured["embedding"] != 0
    assert 0.3 < kept.mean() < 0.7
    whole = model.embedding.embedding[...][TOKENS]
    assert_close("kept", captured["embedding"][kept], 2 * whole[kept], 1e-6)


def test_bfloat16_is_close_and_streams():
    model = build(dtype="bfloat16")
    expected = run(build(), TOKENS)
    logits = run(model, TOKENS)
    assert logits.dtype == jnp.float32
    assert_close("logits", logits, expected, 3e-2)
    first, state = extend(model, TOKENS[:, :5], model.init_state(B, T))
    rest, _ = extend(model, TOKENS[:, 5:], state)
    assert_close("streamed", jnp.concatenate([first, rest], 1), expected, 3e-2)


def test_state_bytes_count_all_layers():
    model = build()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(model.init_state(1, T)))
    assert model.state_bytes(T) == held


def test_the_model_without_mlp_and_with_layer_norm():
    model = build(mlp_width=0, norm="layer")
    _, captured = nnx.jit(lambda model, x: model(x, capture=True))(model, TOKENS)
    assert "block_0/mlp" not in captured
    centred = captured["norm"].mean(-1)  # of a LayerNorm with scale 1 and bias 0
    np.testing.assert_allclose(centred, 0, atol=1e-5)


def test_the_default_mlp_width_is_a_multiple_of_256():
    assert CONFIG.replace(mlp_width=None).mlp_size == 256
    assert CONFIG.replace(mlp_width=None, width=144).mlp_size == 512


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": ()}, "LMConfig.pattern: expected at least one name"),
        ({"pattern": ("linear", "mamba")}, r"LMConfig.pattern: expected names among \['conv'"),
        ({"num_layers": 0}, "LMConfig.num_layers"),
        ({"dropout": 1.0}, "LMConfig.dropout: expected a probability below 1"),
        ({"mlp_width": -1}, "LMConfig.mlp_width"),
        ({"width": 15}, "a divisor of width=15"),
        ({"norm": "batch"}, "LMConfig.norm"),
    ],
)
def test_configs_name_what_does_not_fit(no_type_hook, changes, message):
    with pytest.raises(ValueError, match=message):
        CONFIG.replace(**changes)


def test_bad_calls_are_named(no_type_hook):
    model = build()
    with pytest.raises(ValueError, match="tokens: expected 2 axes"):
        model(TOKENS[0])
    with pytest.raises(ValueError, match="tokens: expected 2 axes"):
        model(TOKENS[:, :0])
    with pytest.raises(ValueError, match="tokens: expected an integer dtype"):
        model(TOKENS * 1.0)
    state = model.init_state(B, T)
    with pytest.raises(ValueError, match="state: expected 3 layers, got 2"):
        model.extend(TOKENS, type(state)(state.layers[:2]))
    with pytest.raises(ValueError, match="state: expected B=2 streams"):
        model.extend(TOKENS, model.init_state(B + 1, T))
