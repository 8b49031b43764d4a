"""The Hopper kernels without a GPU: simulated, against the definition, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcattn.ops import dispatch, softplus_attention
from lcattn.ops.visibility import visibility
from pallas_kernels.softplus_attention import mosaic_gpu
from pallas_kernels.softplus_attention.config import LaunchConfig
from pallas_kernels.softplus_attention.rows import Scales

SIMULATED = LaunchConfig(warpgroups=1, width=64)

CASES = {
    # name: T, K, power, documents
    "p=15, ragged, grouped queries": (150, 1, 15, None),
    "p=1, packed with padding": (128, 2, 1, [0] * 9 + [-1] * 3 + [2] * 70 + [5] * 40 + [-1] * 6),
    "LSSA": (128, 2, None, None),
}


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


def assert_close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def definition(q, k, v, scales, mask, power):
    """The formulas on scores in powers of two, in float32."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    length, offset = (x[:, None, :, None] for x in scales)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest")
    weights = jnp.where(mask[:, None], jax.nn.softplus(np.log(2) * scores), 0)
    seen = mask.any(axis=2)[:, None, :, None]
    mean = jnp.where(seen, weights.sum(axis=3, keepdims=True) / length, 1)
    if power is not None:
        weights = jnp.maximum(weights / mean - offset, 0)
        weights = (weights / jnp.where(seen, weights.max(axis=3, keepdims=True), 1)) ** power
    total = jnp.where(seen, weights.sum(axis=3, keepdims=True), 1)
    return jnp.einsum("bnts,bsnh->btnh", weights / total, v, precision="highest")


@pytest.mark.parametrize("name", CASES)
def test_values_and_every_gradient_agree_with_the_definition(name):
    T, K, power, documents = CASES[name]
    arrays = (
        normal(1, T, 2, 64, scale=0.6),
        normal(1, T, K, 64, seed=1),
        normal(1, T, K, 64, seed=2),
    )
    ids = jnp.asarray([documents or [0] * T])
    seen = visibility(T, T, causal=True, segment_ids=ids)
    length = jnp.maximum(seen.num_keys(), 1).astype(jnp.float32)
    scales = Scales(length, jnp.where(length <= 3, 0.0, 1.0))

    def kernel(*arrays):
        return mosaic_gpu.softplus_attention(
            *arrays, scales, None if documents is None else (seen.queries, seen.end),
            power=power, flat_below=1e-5, config=SIMULATED, interpret=True,
        )  # fmt: skip

    def run(f, arrays, g):
        out, pull = jax.vjp(f, *arrays)
        return out, *pull(g)

    g = normal(1, T, 2, 64, seed=9)
    got = jax.jit(run, static_argnums=0)(kernel, arrays, g)
    assert got[0].dtype == jnp.bfloat16
    reference = functools.partial(definition, scales=scales, mask=seen.mask(), power=power)
    want = run(reference, *jax.tree.map(lambda x: x.astype(jnp.float32), (arrays, g)))
    assert_close(got, want, 1e-2)
    if documents is not None:
        assert not np.any(np.asarray(got[0])[0, np.asarray(documents) < 0])


@pytest.fixture
def simulated(monkeypatch):
    """Makes the op run the kernels in the CPU simulator."""
    run = mosaic_gpu.softplus_attention

    def interpreted(*args, **options):
        return run(*args, **options, config=SIMULATED, interpret=True)

    monkeypatch.setattr(mosaic_gpu, "softplus_attention", interpreted)
    monkeypatch.setattr(dispatch, "on_hopper", lambda: True)


def test_the_op_scales_and_packs_as_its_other_forms_do(simulated):
    q, k, v = (normal(1, 64, 1, 64, seed=seed) for seed in range(3))
    options = {"power": 3.0, "segment_ids": jnp.asarray([[0] * 30 + [1] * 30 + [-1] * 4])}
    got = softplus_attention(q, k, v, **options, implementation="mosaic_gpu")
    want = softplus_attention(q, k, v, **options, implementation="reference")
    assert_close([got], [want], 1e-2)


def test_a_flat_row_is_the_mean_of_the_values_and_its_gradients_are_finite(simulated):
    q, v = normal(1, 64, 1, 64), normal(1, 64, 1, 64, seed=1)

    def run(q, k, v):
        f = functools.partial(softplus_attention, power=15.0, implementation="mosaic_gpu")
        out, pull = jax.vjp(f, q, k, v)
        return out, *pull(v)

    out, *gradients = jax.jit(run)(q, jnp.broadcast_to(q[:, :1], q.shape), v)
    length = np.arange(1, 65)[None, :, None, None]
    assert_close([out], [np.cumsum(np.asarray(v, np.float64), axis=1) / length], 4e-3)
    assert all(np.all(np.isfinite(np.asarray(x, np.float32))) for x in gradients)


@pytest.mark.parametrize(
    ("T", "K", "H", "power", "packed"),
    [(32768, 16, 128, 15.0, False), (1000, 4, 64, 3.0, True), (2048, 16, 128, None, False)],
    ids=str,
)
def test_gradients_lower_for_cuda(T, K, H, power, packed, monkeypatch):
    monkeypatch.setattr(dispatch, "on_hopper", lambda: True)

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
    monkeypatch.setattr(dispatch, "on_hopper", lambda: True)
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
