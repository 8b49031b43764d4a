"""The Hopper kernels without a GPU: simulated, against the XLA form, and lowered for CUDA."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcattn.ops import NeuralMemoryState, dispatch, neural_memory
from lcattn.ops.neural_memory.coefficients import coefficients
from pallas_kernels.neural_memory import gpu_activations, gpu_gates, mosaic_gpu
from pallas_kernels.neural_memory.gpu_plan import Plan


@pytest.fixture
def on_a_simulated_gpu(monkeypatch):
    simulated = functools.partial(mosaic_gpu.neural_memory, interpret=True)
    monkeypatch.setattr(dispatch, "on_hopper", lambda: True)
    monkeypatch.setattr(mosaic_gpu, "neural_memory", simulated)


def inputs(B, T, N, M, hidden, H=64, dtype=jnp.bfloat16):
    """The op's arrays: unit vectors, and gates of which some are 0 or 1."""
    draw = np.random.default_rng(0)

    def unit(heads):
        x = draw.normal(size=(B, T, heads, H))
        return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), dtype)

    def gate(most):
        x = np.clip(draw.uniform(-0.1, 1.1, size=(B, T, M)), 0, 1)
        return jnp.asarray(most * x, jnp.float32)

    shut = jnp.asarray(draw.random((B, T, M)) < 0.02)
    return {
        "q": unit(N), "k": unit(M), "v": unit(M), "learning_rate": gate(1 / 64),
        "momentum": gate(1), "decay": jnp.where(shut, 1, gate(0.1)),
        "weights": [
            jnp.asarray(draw.normal(size=(M, i, o)) / i**0.5, jnp.float32)
            for i, o in itertools.pairwise((H, *hidden, H))
        ],
    }  # fmt: skip


def under_way(arrays):
    """A state inside a chunk."""
    B, draw = len(arrays["q"]), np.random.default_rng(1)
    weights, momentum, anchor = (
        tuple(jnp.asarray(draw.normal(size=(B, *x.shape)) / x.shape[1] ** 0.5, jnp.float32)
              for x in arrays["weights"])
        for _ in range(3)
    )  # fmt: skip
    return NeuralMemoryState(weights, momentum, anchor, jnp.full((B,), 40, jnp.int32))


def run(implementation, documents, arrays, state=None):
    out, final = neural_memory(
        **arrays, segment_ids=documents, initial_state=state, return_state=True,
        implementation=implementation,
    )  # fmt: skip
    return out, (final.weights, final.momentum, final.anchor)


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradients(implementation, arrays, state=None, documents=None):
    """With every value as its own gradient."""
    values, pull = jax.vjp(functools.partial(run, implementation, documents), arrays, state)
    return values, jax.tree.map(lambda x: x.astype(jnp.float32), pull(values))


def assert_close(got, want, tolerance):
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), jax.tree_util.keystr(path)


def wide(arrays):
    return jax.tree.map(lambda x: x.astype(jnp.float32), arrays)


PACKED = [[0] * 30 + [1] * 70 + [2] + [3] * 5 + [-1] * 2 + [4] * 64 + [5] * 3, [-1] * 175]
"""Chunks that go on, that are whole and that are not; windows of several documents; padding."""

CASES = {
    # name: (B, T, N, M, hidden, H), documents
    "two layers, a cluster of units, documents, going on inside a chunk, grouped queries": (
        (1, 100, 2, 1, (128,), 64), [[0] * 30 + [1] * 3 + [2] * 66 + [-1]],
    ),
    "two layers of 128, a cluster of their halves, a rest": ((1, 140, 1, 1, (64,), 128), None),
    "one layer of 128, documents, going on": ((2, 175, 1, 1, (), 128), PACKED),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_values_states_and_every_gradient_agree_with_the_xla_form(name, on_a_simulated_gpu):
    shape, documents = CASES[name]
    arrays = inputs(*shape)
    state = None if documents is None else under_way(arrays)
    ids = None if documents is None else jnp.asarray(documents)
    got = values_and_gradients("mosaic_gpu", arrays, state, ids)
    assert got[0][0].dtype == jnp.bfloat16
    assert_close(got, values_and_gradients("xla", wide(arrays), state, ids), 1.2e-2)


def test_gates_are_multiplied_as_xla_multiplies_them():
    """An odd number of chunks, of documents that begin anywhere and with slots without a token."""
    arrays, draw = inputs(1, 3 * 64, 1, 1, ()), np.random.default_rng(2)
    gates = [arrays[x].reshape(1, 1, 3, 64) for x in ("learning_rate", "momentum", "decay")]
    used = jnp.asarray(draw.random((1, 1, 3, 64)) < 0.9)
    first = used & jnp.asarray(draw.random(used.shape) < 0.05)

    def kernels(*gates):
        views, shares = gpu_gates.views_and_shares(
            Plan("gelu", interpret=True), gpu_gates.Gates(*gates, used, first)
        )
        return views.kept, views.carried, gpu_gates.unpair(views.written)[:, :, :3], shares

    def xla(*gates):
        c = coefficients(*gates, used=used, first=first)
        last = jnp.stack([c.kept[..., -1], c.carried[..., -1], c.momentum], axis=-1)
        last = jnp.broadcast_to(last[..., None], (*last.shape, 64))
        shares = [c.written[..., -1, :], c.pending, *jnp.moveaxis(last, -2, 0)]
        return c.kept, c.carried, c.written, jnp.stack(shares, axis=-2)

    @functools.partial(jax.jit, static_argnums=0)
    def values_and_pulled(form, cotangents):
        values, pull = jax.vjp(form, *gates)
        return values, pull(cotangents)

    cotangents = jax.tree.map(
        lambda x: jnp.asarray(draw.normal(size=x.shape), jnp.float32), jax.eval_shape(xla, *gates)
    )
    assert_close(values_and_pulled(kernels, cotangents), values_and_pulled(xla, cotangents), 1e-6)


def test_gradients_lower_for_cuda(monkeypatch):
    monkeypatch.setattr(dispatch, "on_hopper", lambda: True)
    shapes = jax.eval_shape(lambda: inputs(4, 8192, 4, 4, (256,)))

    def loss(arrays):
        return jnp.sum(run("mosaic_gpu", None, arrays)[0].astype(jnp.float32))

    text = jax.jit(jax.grad(loss)).trace(shapes).lower(lowering_platforms=("cuda",)).as_text()
    for name in ("gates", "walk", "read", "gates_pull", "pull", "read_pull", "token_gradients"):
        assert f"neural_memory_{name}" in text


@pytest.mark.parametrize("name", gpu_activations.ACTIVATIONS)
def test_derivatives_of_activations(name):
    function = {"tanh": jnp.tanh}.get(name) or getattr(jax.nn, name)
    x = jnp.linspace(-4.1, 4, 50)
    slope = jax.grad(function)
    want = [jax.vmap(f)(x) for f in (function, slope, jax.grad(slope))]
    for a, b in zip(gpu_activations.ACTIVATIONS[name](x), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"dtype": jnp.float32}, {}, "take bfloat16, not float32"),
        ({"H": 32}, {}, "take layers of sizes H -> H or H -> F -> H, H = 64 or 128, .*, not 32"),
        ({"hidden": (96,)}, {}, "not 64 -> 96 -> 64"),
        ({"hidden": (320,)}, {}, "up to 4 H, not 64 -> 320 -> 64"),
        ({"hidden": (64, 64)}, {}, "not 64 -> 64 -> 64 -> 64"),
        ({}, {"chunk_size": 32}, "take chunks of 64 tokens and a whole one at least, not 32"),
        ({"T": 63}, {}, "not 64 of 63"),
        ({}, {"activation": jnp.sin}, "knows no activation but those with names"),
    ],
    ids=["float32", "H", "96", "320", "layers", "chunk", "short", "activation"],
)
def test_a_call_that_is_not_served_is_told_why(change, options, message, on_a_simulated_gpu):
    arrays = inputs(**{"B": 1, "T": 64, "N": 1, "M": 1, "hidden": (64,)} | change)
    with pytest.raises(ValueError, match=message):
        neural_memory(**arrays, **options, implementation="mosaic_gpu")


def test_the_op_says_what_the_kernels_need():
    with pytest.raises(ValueError, match="'mosaic_gpu' needs a Hopper GPU"):
        neural_memory(**inputs(1, 64, 1, 1, (64,)), implementation="mosaic_gpu")


def test_what_was_timed_takes_the_kernels_unasked(monkeypatch):
    taken = []

    def choose(op, name, **call):
        taken.append(dispatch.best(op, **call))
        return dispatch.OPS[op]["xla"].run

    monkeypatch.setattr(dispatch, "on_hopper", lambda: True)
    monkeypatch.setattr(dispatch, "choose", choose)

    def chosen(devices=1, *, T=300, F=64, packed=False, continued=False, dtype=jnp.bfloat16):
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        arrays = inputs(1, T, 1, 1, (), F, dtype)
        ids = jnp.zeros((1, T), jnp.int32) if packed else None
        state = under_way(arrays) if continued else None
        jax.eval_shape(functools.partial(run, None, ids), arrays, state)
        return taken.pop()

    kernels = [chosen(), chosen(F=128), chosen(packed=True), chosen(continued=True)]
    assert kernels == ["mosaic_gpu"] * 4
    assert [chosen(2), chosen(T=299), chosen(dtype=jnp.float32)] == ["xla"] * 3
