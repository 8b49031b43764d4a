"""Using the library from Equinox, Flax Linen and plain JAX: each test is an example to copy."""

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lcattn import ops
from lcattn.nn import LinearAttention, LinearAttentionConfig

WIDTH, HEADS, FEATURES = 32, 4, 8


def test_equinox():
    """An Equinox module: parameters are Equinox's, the op is a function of arrays."""

    class BasedAttention(eqx.Module):
        query: eqx.nn.Linear
        key: eqx.nn.Linear
        value: eqx.nn.Linear
        out: eqx.nn.Linear

        def __init__(self, key):
            q, k, v, o = jax.random.split(key, 4)
            self.query = eqx.nn.Linear(WIDTH, HEADS * FEATURES, use_bias=False, key=q)
            self.key = eqx.nn.Linear(WIDTH, HEADS * FEATURES, use_bias=False, key=k)
            self.value = eqx.nn.Linear(WIDTH, WIDTH, use_bias=False, key=v)
            self.out = eqx.nn.Linear(WIDTH, WIDTH, use_bias=False, key=o)

        def __call__(self, x):  # [T, D], as Equinox modules take no batch
            heads = (
                jax.vmap(layer)(x).reshape(1, len(x), HEADS, -1)
                for layer in (self.query, self.key, self.value)
            )
            y = ops.linear_attention(*heads)
            return jax.vmap(self.out)(y.reshape(len(x), WIDTH))

    model = BasedAttention(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 12, WIDTH))

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(model, x):
        return jnp.mean(jax.vmap(model)(x) ** 2)

    value, gradients = loss(model, x)
    improved = eqx.apply_updates(model, jax.tree.map(lambda g: -g, gradients))
    assert loss(improved, x)[0] < value


def test_flax_linen():
    """A Linen model: `to_linen` turns a mixer into one of its modules."""
    config = LinearAttentionConfig(width=WIDTH, num_heads=HEADS, feature_dim=FEATURES)

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = x + nnx.bridge.to_linen(LinearAttention, config, name="mixer")(linen.LayerNorm()(x))
            return linen.Dense(1)(x)

    x = jax.random.normal(jax.random.key(1), (2, 12, WIDTH))
    model = Model()
    variables = model.init(jax.random.key(0), x)

    @jax.jit
    @jax.value_and_grad
    def loss(variables, x):
        return jnp.mean(model.apply(variables, x) ** 2)

    value, gradients = loss(variables, x)
    assert loss(jax.tree.map(lambda p, g: p - 0.1 * g, variables, gradients), x)[0] < value


def test_plain_jax():
    """No framework at all: train on whole sequences, then stream with the state in hand."""

    def attend(parameters, x, **state):
        q, k, v = (
            (x @ parameters[name]).reshape(*x.shape[:2], HEADS, -1) for name in ("q", "k", "v")
        )
        return ops.linear_attention(q, k, v, **state)

    rng = np.random.default_rng(0)
    sizes = {"q": HEADS * FEATURES, "k": HEADS * FEATURES, "v": WIDTH}
    parameters = {
        name: jnp.float32(0.1 * rng.standard_normal((WIDTH, n))) for name, n in sizes.items()
    }
    x = jnp.float32(rng.standard_normal((2, 12, WIDTH)))
    gradients = jax.jit(jax.grad(lambda p: jnp.sum(attend(p, x) ** 2)))(parameters)
    assert jax.tree.all(jax.tree.map(lambda g: jnp.any(g != 0), gradients))

    @jax.jit
    def generate(parameters, x):
        def step(state, token):
            y, state = attend(parameters, token[:, None], initial_state=state, return_state=True)
            return state, y[:, 0]

        state = ops.linear_attention_state(len(x), HEADS, FEATURES, WIDTH // HEADS)
        return jax.lax.scan(step, state, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    np.testing.assert_allclose(generate(parameters, x), attend(parameters, x), rtol=1e-4, atol=1e-5)
