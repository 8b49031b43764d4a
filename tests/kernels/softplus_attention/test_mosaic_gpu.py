"""The Hopper kernels without a GPU: simulated, against the definition, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcattn.ops import softplus_attention
from lcattn.ops.softplus_attention import kernel
from pallas_kernels.softplus_attention import mosaic_gpu
from pallas_kernels.softplus_attention.config import LaunchConfig

SIMULATED = LaunchConfig(warpgroups=1, width=64)

CASES = {
    # name: T, K, power, documents
    "p=15, ragged, grouped queries": (150, 1, 15.0, None),
    "p=1, packed with padding": (128, 2, 1.0, [0] * 9 + [-1] * 3 + [2] * 70 + [5] * 40 + [-1] * 6),
    "LSSA": (128, 2, None, None),
}


@pytest.fixture
def simulated(monkeypatch):
    """Makes the op run the kernels in the CPU simulator."""
    run = mosaic_gpu.softplus_attention

    def interpreted(*args, **options):
        return run(*args, **options, config=SIMULATED, interpret=True)

    monkeypatch.setattr(mosaic_gpu, "softplus_attention", interpreted)
    monkeypatch.setattr(kernel.dispatch, "on_hopper", lambda: True)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


def inputs(T, K, N=2, H=64):
    return tuple(normal(1, T, heads, H, seed=i) for i, heads in enumerate((N, K, K)))


def assert_close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def with_gradients(arrays, g, **options):
    def run(arrays, g):
        out, pull = jax.vjp(lambda *a: softplus_attention(*a, **options), *arrays)
        return out, *pull(g.astype(out.dtype))

    return jax.jit(run)(arrays, g)


@pytest.mark.parametrize("name", CASES)
def test_values_and_every_gradient_agree_with_the_definition(name, simulated):
    T, K, power, documents = CASES[name]
    arrays, g = inputs(T, K), normal(1, T, 2, 64, seed=9)
    options = {
        "power": power, "segment_ids": None if documents is None else jnp.asarray([documents])
    }  # fmt: skip
    got = with_gradients(arrays, g, **options, implementation="mosaic_gpu")
    assert got[0].dtype == jnp.bfloat16
    wide = tuple(x.astype(jnp.float32) for x in arrays)
    want = with_gradients(wide, g, **options, implementation="reference")
    # bfloat16 rounds cosines by 3e-4, scores by 6e-3, and weights by p times that.
    assert_close(got, want, 2e-2 if power == 15 else 8e-3)
    if documents is not None:
        assert not np.any(np.asarray(got[0])[0, np.asarray(documents) < 0])


def test_a_flat_row_is_the_mean_of_the_values_and_its_gradients_are_finite(simulated):
    q, k, v = inputs(64, 2)
    k = jnp.broadcast_to(k[:, :1], k.shape)
    out, *gradients = with_gradients((q, k, v), v, power=15.0, implementation="mosaic_gpu")
    length = np.arange(1, 65)[None, :, None, None]
    mean = np.cumsum(np.asarray(v, np.float64), axis=1) / length
    assert_close([out], [mean], 4e-3)
    assert all(np.all(np.isfinite(np.asarray(x, np.float32))) for x in gradients)


@pytest.mark.parametrize(
    ("T", "K", "H", "power", "packed"),
    [(32768, 16, 128, 15.0, False), (1000, 4, 64, 3.0, True), (2048, 16, 128, None, False)],
    ids=str,
)
def test_gradients_lower_for_cuda(T, K, H, power, packed, monkeypatch):
    monkeypatch.setattr(kernel.dispatch, "on_hopper", lambda: True)

    def loss(q, k, v, ids):
        out = softplus_attention(
            q, k, v, power=power, segment_ids=ids if packed else None, implementation="mosaic_gpu"
        )
        return out.astype(jnp.float32).sum()

    arrays = [jax.ShapeDtypeStruct((1, T, heads, H), jnp.bfloat16) for heads in (16, K, K)]
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    text = gradient.trace(*arrays, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": jnp.float32}, "take bfloat16, not float32"),
        ({"H": 96}, "keys and values of one size, 64 or 128, not F=96, H=96"),
        ({"power": 2.5}, "take a whole power from 1 to 16, not 2.5"),
        ({"causal": False}, "is causal"),
        ({"scale": -1.0}, "takes a positive scale"),
        ({"query_position": 0}, "as many queries as keys, from the first position on"),
    ],
)
def test_a_call_that_is_not_served_is_told_why(change, message, monkeypatch):
    monkeypatch.setattr(kernel.dispatch, "on_hopper", lambda: True)
    call = {"H": 64, "dtype": jnp.bfloat16, "power": 15.0} | change
    q = jnp.ones((1, 64, 1, call.pop("H")), call.pop("dtype"))
    with pytest.raises(ValueError, match=message):
        softplus_attention(q, q, q, **call, implementation="mosaic_gpu")


def test_the_op_says_what_the_kernels_need():
    q = jnp.ones((1, 64, 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="'mosaic_gpu' needs a Hopper GPU"):
        softplus_attention(q, q, q, implementation="mosaic_gpu")


@pytest.mark.parametrize(
    "field", ["warpgroups", "width", "stages", "gradient_width", "gradient_stages"]
)
def test_launch_parameters_are_checked(field):
    with pytest.raises(ValueError, match=rf"LaunchConfig.{field}: expected one of"):
        LaunchConfig(**{field: 5})
