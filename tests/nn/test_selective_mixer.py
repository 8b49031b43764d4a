"""How temperatures are learned, and that a converted layer starts as it was."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcattn import nn, ops

WIDTH, T = 16, 9


def _make(seed=0, **fields):
    return nn.SelectiveAttentionConfig(width=WIDTH, num_heads=4, **fields).make(nnx.Rngs(seed))


def _input(seed=0, batch=1, length=T):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((batch, length, WIDTH)), jnp.float32)


def test_a_converted_layer_starts_as_it_was():
    softmax = nn.SoftmaxAttentionConfig(width=WIDTH, num_heads=4).make(nnx.Rngs(1))
    selective = _make()
    nnx.update(selective, nnx.state(softmax))
    np.testing.assert_array_equal(selective(_input()), softmax(_input()))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 0.0),
        ({"position": "exp"}, 6.2e-4),
        ({"position": "exp", "position_init": 1.5}, 0.0113),
        ({"position": "sigmoid"}, 0.5),
    ],
)
def test_published_starts_of_the_position_term(fields, expected):
    assert _make(**fields).position.coefficient()[0] == pytest.approx(expected, rel=2e-2)


def test_scopes():
    """One number for the layer, one a head, one a token, one a token and head."""
    x, q = _input(), jnp.ones((1, T, 4, 4))
    assert _make(position_per_head=True).position.coefficient().shape == (4,)
    for fields, heads in (({}, 4), ({"gate_per_head": False}, 1)):
        for hidden in (None, 8):
            gate = _make(gate_hidden=hidden, gate_init="xavier", **fields).query_gate
            assert gate(x, q).shape == (1, T, heads)


def test_temperatures_reach_the_op():
    mixer = _make(gate_init="xavier", position_init=0.4, position_encoding="nope")
    x = _input()
    q, k, v = mixer.project(x)
    temperature = 1 + 0.4 * jnp.log(jnp.arange(1, T + 1))[None, :, None] + mixer.query_gate(x, q)
    heads = ops.selective_attention(q, k, v, temperature, 1 + mixer.value_gate(x, v))
    np.testing.assert_allclose(mixer(x), mixer.out(heads.reshape(1, T, -1)), rtol=1e-4, atol=1e-6)


def test_scalable_softmax_is_a_special_case():
    mixer = _make(base=0.0, position_init=0.7, position_encoding="nope")
    q, k, v = mixer.project(_input())
    scaled = q * 0.7 * jnp.log(jnp.arange(1, T + 1))[None, :, None, None]
    heads = ops.softmax_attention(scaled, k, v)
    expected = mixer.out(heads.reshape(1, T, -1))
    np.testing.assert_allclose(mixer(_input()), expected, rtol=1e-4, atol=1e-6)


def test_a_cached_step_knows_how_many_keys_it_sees():
    """The published code slices the row lengths by the queries: every step has n = 1."""
    mixer, x = _make(position_init=0.5, position_encoding="nope", init_std=0.5), _input()
    _, state = mixer.extend(x[:, :-1], mixer.init_state(1, T))
    step, _ = mixer.extend(x[:, -1:], state)
    np.testing.assert_allclose(step, mixer(x)[:, -1:], rtol=1e-4, atol=1e-6)
    mixer.position.parameter[...] = jnp.zeros(1)  # ln 1 = 0
    assert np.abs(mixer(x)[:, -1:] - step).max() > 1e-2 * np.abs(step).max()


def test_left_padding_does_not_count():
    mixer, x = _make(position_init=0.5), _input()
    ids = jnp.asarray([[-1] * 3 + [0] * (T - 3)], jnp.int32)
    np.testing.assert_allclose(mixer(x, ids)[:, 3:], mixer(x[:, 3:]), rtol=1e-4, atol=1e-6)


def test_saturated_gates_are_finite():
    mixer = _make(gate_init="xavier")
    for gate in (mixer.query_gate, mixer.value_gate):
        gate.weight[...] = 1e4 * gate.weight[...]
    gradients = nnx.grad(lambda m: jnp.sum(m(_input()) ** 2))(mixer)
    assert all(np.all(np.isfinite(g)) for g in nnx.to_flat_state(gradients).leaves)


@pytest.mark.parametrize(
    "fields", [{"position": "softplus"}, {"gate_hidden": 0}, {"gate_init": "ones"}]
)
@pytest.mark.usefixtures("no_type_hook")
def test_bad_configs(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        _make(**fields)
