"""The TPU kernels without a TPU: simulated, against the XLA form, lowered, and compiled."""

import functools

import compiled_for_tpu
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcattn.ops import dispatch, gated_linear_attention
from pallas_kernels.gated_linear_attention import mosaic_tpu
from pallas_kernels.gated_linear_attention.config import TpuLaunchConfig, tpu_heuristic

PACKED = [[-1] * 3 + [2] * 100 + [3] * 107 + [-1] * 10 + [5] + [6] * 79, [-1] * 300]

CASES = {
    # name: (B, T, N, M, F, H), strength of decays, documents, dtype, chunks of a step
    "channels, mild, packed, grouped queries, float32": (
        (2, 300, 2, 1, 16, 8), 0.1, PACKED, jnp.float32, 2,
    ),
    "channels, of all strengths, some reset, bfloat16": (
        (1, 400, 2, 2, 24, 16), 5.0, None, jnp.bfloat16, 1,
    ),
    "heads, strong, packed, ragged, bfloat16": (
        (2, 300, 2, 2, 8, 16), 3.0, PACKED, jnp.bfloat16, 4,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def on_a_tpu(monkeypatch):
    monkeypatch.setattr(dispatch, "default_platform", lambda: "tpu")


def inputs(name, size=1.0):
    """q, k, v, log decays, an initial state; cotangents of the output and of the final state."""
    (B, T, N, M, F, H), strength, _, dtype, _ = CASES[name]
    draw = np.random.default_rng(0)

    def normal(*shape, dtype=dtype):
        return jnp.asarray(size * draw.normal(size=shape), dtype)

    by_head = name.startswith("heads")
    log_decay = -strength * np.abs(draw.normal(size=(B, T, M) if by_head else (B, T, M, F)))
    if "some reset" in name:
        log_decay *= np.geomspace(1e-3, 1, T)[:, None, None]  # so that each chunk is another case
        log_decay[:, 390, :, ::3] = -np.inf
    arrays = (
        normal(B, T, N, F), normal(B, T, M, F), normal(B, T, M, H),
        jnp.asarray(log_decay, jnp.float32), normal(B, M, F, H, dtype=jnp.float32),
    )  # fmt: skip
    return arrays, (normal(B, T, N, H), normal(B, M, F, H, dtype=jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradients(implementation, documents, arrays, cotangents):
    def run(q, k, v, log_decay, start):
        return gated_linear_attention(
            q, k, v, log_decay, segment_ids=documents, initial_state=start, return_state=True,
            chunk_size=16, implementation=implementation,
        )  # fmt: skip

    values, pull = jax.vjp(run, *arrays)
    return values, pull(cotangents)


def both(name, monkeypatch, **changes):
    """What the kernels give, and what the XLA form gives in float32."""
    *_, documents, _, chunks = CASES[name]
    simulated = functools.partial(
        mosaic_tpu.gated_linear_attention, config=TpuLaunchConfig(chunks=chunks), interpret=True
    )
    monkeypatch.setattr(mosaic_tpu, "gated_linear_attention", simulated)
    given = inputs(name, **changes)
    ids = None if documents is None else jnp.asarray(documents)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), given)
    return values_and_gradients("mosaic_tpu", ids, *given), values_and_gradients("xla", ids, *wide)


def assert_close(got, want, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("name", CASES)
def test_values_states_and_every_gradient_agree_with_the_xla_form(name, monkeypatch):
    got, want = both(name, monkeypatch)
    dtype = CASES[name][3]
    assert got[0][0].dtype == dtype
    assert_close(got, want, 1e-6 if dtype == jnp.float32 else 5e-3)


@pytest.mark.parametrize("size", [1e4, 1e-6])
def test_extreme_values(size, monkeypatch):
    name = "channels, mild, packed, grouped queries, float32"
    assert_close(*both(name, monkeypatch, size=size), 1e-5)


def test_gradients_of_the_op_lower_for_tpu():
    def loss(q, v, log_decay):
        out = gated_linear_attention(q, q, v, log_decay, implementation="mosaic_tpu")
        return jnp.square(out.astype(jnp.float32)).sum()

    q, v = (jax.ShapeDtypeStruct((1, 32768, 16, size), jnp.bfloat16) for size in (64, 128))
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    text = gradient.trace(q, v, q).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 2


def test_they_compile_for_every_tpu_as_recorded():
    compiled_for_tpu.check("gated_linear_attention")


def test_launch_parameters_suit_the_shape():
    shape = {"T": 32768, "groups": 1, "F": 128, "H": 128, "itemsize": 2}
    assert tpu_heuristic(**shape).chunks == 4
    assert tpu_heuristic(**shape | {"T": 600}).chunks == 1  # five chunks are not six
    assert tpu_heuristic(**shape | {"groups": 16}).chunks == 2
    with pytest.raises(ValueError, match=r"TpuLaunchConfig.chunks: expected a whole number"):
        TpuLaunchConfig(chunks=17)


@pytest.mark.parametrize(
    ("dtype", "size", "heads", "message"),
    [
        (jnp.float16, 64, 1, "take bfloat16 or float32, not float16"),
        (jnp.bfloat16, 20, 1, "sizes that are multiples of 8, not F=20, H=20"),
        (jnp.bfloat16, 512, 1, r"take up to 14 MiB of VMEM, not \d+, as F=512, H=512 need"),
        (jnp.bfloat16, 256, 32, "need with 32 query heads a state"),
    ],
)
def test_a_call_that_is_not_served_is_told_why(dtype, size, heads, message):
    q, k = (jnp.ones((1, 64, n, size), dtype) for n in (heads, 1))
    with pytest.raises(ValueError, match=message):
        gated_linear_attention(q, k, k, -k, implementation="mosaic_tpu")


def test_no_call_is_served_unasked():
    q = jnp.ones((1, 4096, 1, 64), jnp.bfloat16)
    program = jax.make_jaxpr(lambda q: gated_linear_attention(q, q, q, -jnp.abs(q)))(q)
    assert "pallas_call" not in str(program)


def test_the_op_says_what_the_kernels_need(monkeypatch):
    monkeypatch.undo()
    q = jnp.ones((1, 64, 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="'mosaic_tpu' needs a TPU"):
        gated_linear_attention(q, q, q, -q, implementation="mosaic_tpu")
