"""The TPU kernels without a TPU: simulated, against the XLA form, lowered, and compiled."""

import functools

import compiled_for_tpu
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcattn.ops import dispatch, softplus_attention
from pallas_kernels.softplus_attention import mosaic_tpu
from pallas_kernels.softplus_attention.config import TpuLaunchConfig, tpu_heuristic

PACKED = [[-1] * 3 + [0] * 90 + [2] * 60 + [-1] * 10 + [3] + [4] * 36, [-1] * 200]

CASES = {
    # name: (B, T, N, K, F, H), power, documents, dtype
    "p=15, packed, padded, grouped queries": ((2, 200, 2, 1, 16, 24), 15.0, PACKED, jnp.float32),
    "p=1, ragged": ((1, 130, 1, 1, 32, 16), 1.0, None, jnp.float32),
    "LSSA": ((1, 256, 2, 2, 16, 16), None, None, jnp.bfloat16),
}
"""At p = 1, gradients jump where an excess passes 0: what bfloat16 rounds across is no error."""


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    """Makes the op run the kernels in the TPU simulator."""
    run = functools.partial(
        mosaic_tpu.softplus_attention, config=TpuLaunchConfig(block=128), interpret=True
    )
    monkeypatch.setattr(mosaic_tpu, "softplus_attention", run)
    monkeypatch.setattr(dispatch, "default_platform", lambda: "tpu")


def inputs(B, T, N, K, F, H, dtype, size=1.0):
    """q, k, v and the output's gradient."""
    draw = np.random.default_rng(0)
    return tuple(
        jnp.asarray(size * draw.normal(size=(B, T, *heads)), dtype)
        for heads in ((N, F), (K, F), (K, H), (N, H))
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def output_and_gradients(implementation, power, documents, q, k, v, g):
    attend = functools.partial(
        softplus_attention, power=power, segment_ids=documents, implementation=implementation
    )
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(g)


def both(name, arrays=None):
    """What the kernels give, and what the XLA form gives in float32."""
    shape, power, documents, dtype = CASES[name]
    arrays = inputs(*shape, dtype) if arrays is None else arrays
    ids = None if documents is None else jnp.asarray(documents)
    got = output_and_gradients("mosaic_tpu", power, ids, *arrays)
    wide = (x.astype(jnp.float32) for x in arrays)
    return got, output_and_gradients("xla", power, ids, *wide)


def assert_close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("name", CASES)
def test_the_output_and_every_gradient_agree_with_the_xla_form(name):
    got, want = both(name)
    dtype = CASES[name][3]
    assert got[0].dtype == dtype
    assert_close(got, want, 1e-5 if dtype == jnp.float32 else 1e-2)


def test_padding_gives_zeros():
    got, _ = both("p=15, packed, padded, grouped queries")
    padding = np.asarray(PACKED) < 0
    for x in got:
        assert not np.any(np.asarray(x)[padding])


@pytest.mark.parametrize("size", [1e6, 1e-6])
def test_extreme_values(size):
    name = "p=15, packed, padded, grouped queries"
    arrays = inputs(*CASES[name][0], jnp.float32, size)
    assert_close(*both(name, arrays), 1e-4)


def test_a_flat_row_is_the_mean_of_the_values_and_its_gradients_are_finite():
    name = "p=15, packed, padded, grouped queries"
    q, k, v, g = inputs(*CASES[name][0], jnp.float32)
    got, want = both(name, (q, jnp.broadcast_to(k[:, :1], k.shape), v, g))
    assert_close(got[:1], want[:1], 1e-4)
    assert all(np.all(np.isfinite(x)) for x in got)


def test_one_token_gets_its_own_value():
    x, v = jnp.ones((1, 1, 1, 16)), jnp.arange(8.0).reshape(1, 1, 1, 8)
    attend = functools.partial(softplus_attention, power=15.0, implementation="mosaic_tpu")
    out = jax.jit(attend)(x, x, v)
    assert_close([out], [v], 1e-6)


@pytest.mark.parametrize(
    ("power", "packed", "kernels"), [(15.0, True, 4), (None, False, 3)], ids=str
)
def test_gradients_lower_for_tpu(power, packed, kernels, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(dispatch, "default_platform", lambda: "tpu")

    def loss(q, k, v, ids):
        out = softplus_attention(
            q, k, v, power=power, segment_ids=ids if packed else None, implementation="mosaic_tpu"
        )
        return jnp.square(out.astype(jnp.float32)).sum()

    q, k = (jax.ShapeDtypeStruct((1, 32768, heads, 128), jnp.bfloat16) for heads in (16, 4))
    ids = jax.ShapeDtypeStruct((1, 32768), jnp.int32)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    text = gradient.trace(q, k, k, ids).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == kernels


def test_they_compile_for_every_tpu_as_recorded():
    compiled_for_tpu.check("softplus_attention")


def test_the_block_suits_the_shape():
    assert tpu_heuristic(T=32768).block == 512
    assert tpu_heuristic(T=200).block == 256
    assert tpu_heuristic(T=1).block == 128


def test_launch_parameters_are_checked():
    with pytest.raises(ValueError, match=r"TpuLaunchConfig.block: expected one of"):
        TpuLaunchConfig(block=100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": jnp.float16}, "take bfloat16 or float32, not float16"),
        ({"H": 20}, "take heads of a size 8, 16, ... 256, not F=20"),
        ({"power": 2.5}, "take a whole power from 1 to 16, not 2.5"),
        ({"causal": False}, "is causal"),
        ({"query_position": 0}, "as many queries as keys, from the first position on"),
    ],
)
def test_a_call_that_is_not_served_is_told_why(change, message):
    call = {"H": 64, "dtype": jnp.bfloat16, "power": 15.0} | change
    q = jnp.ones((1, 64, 1, call.pop("H")), call.pop("dtype"))
    with pytest.raises(ValueError, match=message):
        softplus_attention(q, q, q, **call, implementation="mosaic_tpu")


def test_the_op_says_what_the_kernels_need(monkeypatch):
    monkeypatch.undo()
    q = jnp.ones((1, 64, 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="'mosaic_tpu' needs a TPU"):
        softplus_attention(q, q, q, implementation="mosaic_tpu")
