"""The Hopper kernels without a GPU: simulated, against the recurrence, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcattn.ops import dispatch, gated_linear_attention
from lcattn.ops.gated_linear_attention import gpu_kernel, recurrent
from pallas_kernels.gated_linear_attention import mosaic_gpu
from pallas_kernels.gated_linear_attention.config import LaunchConfig, heuristic
from pallas_kernels.gated_linear_attention.mosaic_gpu import gated_linear_attention as kernel


def inputs(B, T, N, M, F, H, strength, dtype, *, by_head=False, seed=0):
    """q, k, v, log decays, an initial state; cotangents of the output and of the final state."""
    draw = np.random.default_rng(seed)

    def normal(*shape, dtype=jnp.bfloat16):
        return jnp.asarray(draw.normal(size=shape), dtype)

    log_decay = -strength * np.abs(draw.normal(size=(B, T, M, 1 if by_head else F)))
    if strength > 1:
        log_decay[:, 17] = -np.inf
    log_decay[:, 100:] /= 100  # mild chunks after strong ones
    arrays = (
        normal(B, T, N, F), normal(B, T, M, F), normal(B, T, M, H),
        jnp.asarray(log_decay, dtype), normal(B, M, F, H, dtype=jnp.float32),
    )  # fmt: skip
    return arrays, (normal(B, T, N, H), normal(B, M, F, H, dtype=jnp.float32))


def recurrence(q, k, v, log_decay, start):
    log_decay = log_decay[..., 0] if log_decay.shape[3] == 1 else log_decay
    wide = (x.astype(jnp.float32) for x in (q, k, v, log_decay))
    return gated_linear_attention(
        *wide, scale=0.3, initial_state=start, return_state=True, implementation="reference"
    )


def simulated(groups):
    return lambda *arrays: kernel(
        *arrays, scale=0.3, config=LaunchConfig(groups=groups), interpret=True
    )


def assert_close(got, want, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


CASES = {
    # name: inputs, groups
    "mild, ragged, by head, a state of two heads": (
        functools.partial(inputs, 1, 100, 2, 1, 128, 128, 0.1, jnp.bfloat16, by_head=True), 2
    ),
    "strong, with resets": (
        functools.partial(inputs, 1, 100, 1, 1, 128, 128, 5.0, jnp.bfloat16), 1
    ),
    "narrow keys; strong, with resets, then mild; float32; a state of two heads": (
        functools.partial(inputs, 1, 190, 2, 1, 64, 128, 5.0, jnp.float32), 2
    ),
    "narrow, strong, with resets; float32": (
        functools.partial(inputs, 1, 64, 1, 1, 64, 64, 5.0, jnp.float32), 1
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_agree_with_the_recurrence(name):
    drawn, groups = CASES[name]
    arrays, cotangents = drawn()
    wide = (cotangents[0].astype(jnp.float32), cotangents[1])

    def values_and_gradients(run, arrays, cotangents):
        values, pull = jax.vjp(run, *arrays)
        return values, pull(cotangents)

    got = jax.jit(functools.partial(values_and_gradients, simulated(groups)))(arrays, cotangents)
    want = jax.jit(functools.partial(values_and_gradients, recurrence))(arrays, wide)
    assert got[0][0].dtype == jnp.bfloat16
    assert_close(got, want, 6e-3)


@pytest.mark.parametrize(
    ("B", "T", "N", "M", "F", "H", "dtype"),
    [(1, 32768, 16, 16, 128, 128, jnp.bfloat16), (2, 1000, 4, 2, 64, 64, jnp.float16)],
    ids=str,
)
def test_gradients_lower_for_cuda(B, T, N, M, F, H, dtype):
    def loss(*arrays):
        return kernel(*arrays, scale=1.0)[0].astype(jnp.float32).sum()

    arrays = [
        jax.ShapeDtypeStruct((B, T, heads, size), dtype)
        for heads, size, dtype in (
            (N, F, jnp.bfloat16), (M, F, jnp.bfloat16), (M, H, jnp.bfloat16), (M, F, dtype)
        )
    ]  # fmt: skip
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    text = gradient.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def test_a_sequence_is_split_until_the_chip_is_full():
    assert heuristic(B=1, T=32768, N=16, F=128, H=128).groups == 8
    assert heuristic(B=16, T=2048, N=16, F=128, H=128).groups == 1
    assert heuristic(B=1, T=100, N=1, F=64, H=64).groups == 2  # no more than there are chunks


@pytest.mark.parametrize("field", ["groups", "stages"])
def test_launch_parameters_are_checked(field):
    with pytest.raises(ValueError, match=rf"LaunchConfig.{field}: expected a whole number from 1"):
        LaunchConfig(**{field: 0})


@pytest.mark.parametrize(
    ("dtype", "size", "message"),
    [
        (jnp.float32, 128, "take bfloat16, not float32"),
        (jnp.bfloat16, 32, "sizes 64 or 128, keys no larger, not F=32"),
    ],
)
def test_a_call_that_is_not_served_is_told_why(dtype, size, message):
    x = jnp.ones((1, 64, 1, size), dtype)
    with pytest.raises(ValueError, match=message):
        kernel(x, x, x, -x, scale=1.0)


def test_the_kernels_run_unasked_from_the_shortest_length_that_was_timed(monkeypatch):
    monkeypatch.setattr(dispatch, "on_hopper", lambda: True)
    monkeypatch.setattr(jax, "device_count", lambda: 1)

    def takes_them(T, **options):
        q = jax.ShapeDtypeStruct((1, T, 1, 128), jnp.bfloat16)
        run = functools.partial(gated_linear_attention, **options)
        return "gated_linear_attention_outputs" in str(jax.make_jaxpr(run)(q, q, q, q))

    assert takes_them(256)
    assert not takes_them(128)
    assert takes_them(128, implementation="mosaic_gpu")
    assert not takes_them(256, chunk_size=32)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert not takes_them(256)


@pytest.mark.parametrize(
    ("F", "H", "served"), [(24, 50, (64, 64)), (64, 100, (64, 128)), (100, 200, (128, 128))]
)
@pytest.mark.parametrize("by_head", [True, False])
def test_other_sizes_are_padded_and_cut_into_blocks(monkeypatch, F, H, served, by_head):
    def stand_in(q, k, v, log_decay, state, *, scale):
        assert (q.shape[-1], v.shape[-1]) == served
        q = q.reshape(*k.shape[:3], -1, q.shape[-1])
        out, state = recurrent.attend(q, k, v, log_decay, state, scale=scale, chunk=64)
        return out.reshape(*out.shape[:2], -1, out.shape[-1]), state

    monkeypatch.setattr(mosaic_gpu, "gated_linear_attention", stand_in)
    d = np.random.default_rng(0)
    q, k, v = (d.normal(size=(1, 3, 2, *shape)) for shape in ((3, F), (F,), (H,)))
    log_decay = -d.uniform(size=(1, 3, 2, 1 if by_head else F))
    inputs = q, k, v, log_decay, d.normal(size=(1, 2, F, H))
    found, expected = (
        form.attend(*map(jnp.asarray, inputs), scale=0.5, chunk=64)
        for form in (gpu_kernel, recurrent)
    )
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_the_op_says_what_the_kernels_need():
    q = jnp.ones((1, 64, 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="'mosaic_gpu' needs a Hopper GPU"):
        gated_linear_attention(q, q, q, -q, implementation="mosaic_gpu")
