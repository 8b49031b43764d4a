"""The TPU kernels without a TPU: simulated, against the XLA form, lowered, and compiled."""

import functools
import itertools

import compiled_for_tpu
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcattn.ops import NeuralMemoryState, dispatch, neural_memory
from pallas_kernels.neural_memory import mosaic_tpu
from pallas_kernels.neural_memory.config import VMEM_LIMIT, TpuLaunchConfig, tpu_heuristic

PACKED = [[0] * 9 + [1] * 25 + [2] + [3] * 2 + [-1] * 2 + [4] * 5, [-1] * 44]

CASES = {
    # name: (B, T, N, K, sizes of layers), options, documents, dtype, chunks
    "two layers, packed, going on inside a chunk, grouped queries, float32": (
        (2, 44, 2, 1, (8, 12, 16)), {"chunk_size": 12}, PACKED, jnp.float32, 4,
    ),
    "one layer, ragged, bfloat16": (
        (1, 70, 2, 2, (16, 8)), {"chunk_size": 16}, None, jnp.bfloat16, 3,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def on_a_tpu(monkeypatch):
    monkeypatch.setattr(dispatch, "default_platform", lambda: "tpu")


def inputs(B, T, N, K, sizes, dtype, chunk_size):
    """The op's arrays but for the state: unit vectors, and gates of which some are 0 or 1."""
    draw = np.random.default_rng(0)

    def unit(heads, size):
        x = draw.normal(size=(B, T, heads, size))
        return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), dtype)

    def gate(most):
        x = np.clip(draw.uniform(-0.1, 1.1, size=(B, T, K)), 0, 1)
        return jnp.asarray(most * x, jnp.float32)

    weights = [
        jnp.asarray(draw.normal(size=(K, i, o)) / i**0.5, jnp.float32)
        for i, o in itertools.pairwise(sizes)
    ]
    shut = jnp.asarray(draw.random((B, T, K)) < 0.1)
    return {
        "q": unit(N, sizes[0]), "k": unit(K, sizes[0]), "v": unit(K, sizes[-1]),
        "learning_rate": gate(1 / chunk_size), "momentum": gate(1),
        "decay": jnp.where(shut, 1, gate(0.3)), "weights": weights,
    }  # fmt: skip


def under_way(arrays, chunk_size):
    """A state inside a chunk."""
    B, draw = len(arrays["q"]), np.random.default_rng(1)
    layers = ([draw.normal(size=(B, *x.shape)) for x in arrays["weights"]] for _ in range(3))
    weights, momentum, anchor = (tuple(jnp.asarray(x / 3, jnp.float32) for x in y) for y in layers)
    position = jnp.arange(B, dtype=jnp.int32) + chunk_size // 2
    return NeuralMemoryState(weights, momentum, anchor, position)


@functools.partial(jax.jit, static_argnums=(0, 1))
def values_and_gradients(implementation, options, documents, arrays, state):
    """With every value as its own gradient, but for its sign."""

    def run(arrays, state):
        out, final = neural_memory(
            **arrays, **dict(options), segment_ids=documents, initial_state=state,
            return_state=True, implementation=implementation,
        )  # fmt: skip
        return out, (final.weights, final.momentum, final.anchor)

    values, pull = jax.vjp(run, arrays, state)
    return values, jax.tree.map(lambda x: x.astype(jnp.float32), pull(values))


def assert_close(got, want, tolerance):
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", CASES)
def test_values_states_and_every_gradient_agree_with_the_xla_form(name, monkeypatch):
    (*shape, sizes), options, documents, dtype, chunks = CASES[name]
    simulated = functools.partial(
        mosaic_tpu.neural_memory, config=TpuLaunchConfig(chunks=chunks), interpret=True
    )
    monkeypatch.setattr(mosaic_tpu, "neural_memory", simulated)
    arrays = inputs(*shape, sizes, dtype, **options)
    state = None if documents is None else under_way(arrays, **options)
    options = tuple(options.items())
    ids = None if documents is None else jnp.asarray(documents)
    got = values_and_gradients("mosaic_tpu", options, ids, arrays, state)
    assert got[0][0].dtype == dtype
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    want = values_and_gradients("xla", options, ids, wide, state)
    assert_close(got, want, 1e-5 if dtype == jnp.float32 else 1.5e-2)


def test_gradients_lower_for_tpu():
    shapes = jax.eval_shape(lambda: inputs(1, 1024, 4, 4, (64, 256, 64), jnp.bfloat16, 64))

    def loss(arrays):
        return jnp.sum(neural_memory(**arrays, implementation="mosaic_tpu").astype(jnp.float32))

    text = jax.jit(jax.grad(loss)).trace(shapes).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 2


def test_they_compile_for_every_tpu_as_recorded():
    compiled_for_tpu.check("neural_memory", VMEM_LIMIT)


def test_launch_parameters_suit_the_shape():
    shape = {"number": 128, "groups": 1, "chunk": 64, "sizes": (64, 256, 64), "itemsize": 2}
    assert tpu_heuristic(**shape).chunks == 8
    assert tpu_heuristic(**shape | {"chunk": 256}).chunks == 2
    assert tpu_heuristic(**shape | {"number": 3}).chunks == 4
    assert tpu_heuristic(**shape | {"sizes": (128, 512, 512, 128)}).chunks == 2
    with pytest.raises(ValueError, match=r"TpuLaunchConfig.chunks: expected a whole number"):
        TpuLaunchConfig(chunks=33)


@pytest.mark.parametrize(
    ("dtype", "size", "options", "message"),
    [
        (jnp.float16, 8, {}, "take bfloat16 or float32, not float16"),
        (jnp.bfloat16, 1024, {}, r"take up to 28 MiB of VMEM, not \d+, as layers of sizes 1024"),
        (jnp.bfloat16, 64, {"chunk_size": 1024}, "and chunks of 1024 need with 1 queries a token"),
        (jnp.bfloat16, 8, {"activation": jnp.sin}, "knows no activation but those with names"),
    ],
)
def test_a_call_that_is_not_served_is_told_why(dtype, size, options, message):
    arrays = inputs(1, 1024, 1, 1, (size, size), dtype, 64)
    with pytest.raises(ValueError, match=message):
        neural_memory(**arrays, **options, implementation="mosaic_tpu")


def test_no_call_is_served_unasked():
    arrays = inputs(1, 4096, 1, 1, (64, 64), jnp.bfloat16, 64)
    assert "pallas_call" not in str(jax.make_jaxpr(lambda x: neural_memory(**x))(arrays))


def test_the_op_says_what_the_kernels_need(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ValueError, match="'mosaic_tpu' needs a TPU"):
        neural_memory(**inputs(1, 4, 1, 1, (8, 8), jnp.float32, 4), implementation="mosaic_tpu")
