"""The Hopper kernels under `jax.vmap`, with their gradients: simulated, against the XLA form."""

import functools
from importlib import import_module
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcattn import ops
from lcattn.ops import dispatch


def memory(q, k, v, gate, **options):
    gate = jax.nn.sigmoid(gate[..., 0].astype(jnp.float32))
    weights = [jnp.eye(64, dtype=jnp.float32)[None]]
    return ops.neural_memory(q, k, v, gate / 64, 0.9 * gate, 0.02 * gate, weights, **options)


def decaying(q, k, v, gate, **options):
    return ops.gated_linear_attention(q, k, v, jax.nn.log_sigmoid(gate), **options)


def windowed(q, k, v, **options):
    return ops.softmax_attention(8 * q, 8 * k, v, window=70, **options)


KERNELS = {
    "linear_attention": functools.partial(
        ops.linear_attention, feature_map="identity", normalize=False
    ),
    "gated_linear_attention": decaying,
    "softplus_attention": ops.softplus_attention,
    "block_sparse_attention": windowed,
    "neural_memory": memory,
}


@pytest.mark.parametrize("name", KERNELS)
def test_vmap_of_kernels_is_that_of_the_xla_form(name, monkeypatch):
    module = import_module(f"pallas_kernels.{name}.mosaic_gpu")
    simulated = mock.Mock(wraps=functools.partial(getattr(module, name), interpret=True))
    monkeypatch.setattr(module, name, simulated)
    monkeypatch.setattr(dispatch, "on_hopper", lambda: True)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    op, draw = KERNELS[name], np.random.default_rng(0)
    count = 4 if op in (memory, decaying) else 3
    shape = 2, 1, 128, 1, 64
    arrays = [jnp.asarray(draw.normal(size=shape) / 8, jnp.bfloat16) for _ in range(count)]

    def values_and_gradients(implementation, arrays):
        def one(*arrays):
            out, pull = jax.vjp(functools.partial(op, implementation=implementation), *arrays)
            return out, *pull(out)

        return jax.jit(jax.vmap(one))(*arrays)

    kernels = "block_sparse" if name == "block_sparse_attention" else "mosaic_gpu"
    wide = [x.astype(jnp.float32) for x in arrays]
    pairs = values_and_gradients(kernels, arrays), values_and_gradients("xla", wide)
    for got, want in zip(*pairs, strict=True):
        got, want = (np.asarray(x, np.float64) for x in (got, want))
        assert np.linalg.norm(got - want) <= 1.2e-2 * np.linalg.norm(want)
    assert simulated.called
