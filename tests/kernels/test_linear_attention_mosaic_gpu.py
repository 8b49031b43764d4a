"""The Hopper kernels without a GPU: simulated, against the recurrence, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcattn.ops import LinearAttentionState, linear_attention
from pallas_kernels.linear_attention.config import LaunchConfig, heuristic
from pallas_kernels.linear_attention.mosaic_gpu import linear_attention as kernel


def inputs(B, T, N, K, F, H, D, normalize, seed=0):
    """q, k, v, an initial state, and cotangents of the output and of the final state."""
    draw = np.random.default_rng(seed)

    def normal(*shape, dtype=jnp.bfloat16):
        return jnp.asarray(draw.normal(size=shape), dtype)

    def state():
        totals = normal(B, K, D, dtype=jnp.float32) if normalize else None
        return normal(B, K, D, H, dtype=jnp.float32), totals

    start = state()
    if normalize:  # weights are positive, so the past has a positive sum
        start = start[0], jnp.zeros((B, K, D)).at[:, :, 0].set(20.0)
    arrays = normal(B, T, N, F), normal(B, T, K, F), normal(B, T, K, H)
    return arrays, start, (normal(B, T, N, H), state())


def recurrence(q, k, v, start, **options):
    state = None if start is None else LinearAttentionState(kv=start[0], normalizer=start[1])
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    out, final = linear_attention(
        *wide, **options, initial_state=state, return_state=True, implementation="reference"
    )
    return out, (final.kv, final.normalizer)


def assert_close(got, want, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


CASES = {
    # name: (B, T, N, K, F, H, D), feature map, normalise, scale, groups
    "taylor, ragged, grouped queries": ((1, 100, 2, 1, 16, 64, 153), "taylor", True, 0.3, 2),
    "taylor, plain": ((1, 64, 1, 1, 16, 64, 153), "taylor", False, 0.25, 1),
    "identity, grouped queries": ((1, 128, 2, 1, 64, 64, 64), "identity", False, 0.125, 2),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_final_state_agree_with_the_recurrence(name):
    shape, feature_map, normalize, scale, groups = CASES[name]
    arrays, start, _ = inputs(*shape, normalize)
    options = {"feature_map": feature_map, "scale": scale, "normalize": normalize}
    got = kernel(*arrays, start, **options, config=LaunchConfig(groups=groups), interpret=True)
    assert_close(got, recurrence(*arrays, start, **options), 4e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_gradient_agrees_with_the_recurrence(name):
    shape, feature_map, normalize, scale, groups = CASES[name]
    arrays, start, cotangents = inputs(*shape, normalize)
    options = {"feature_map": feature_map, "scale": scale, "normalize": normalize}

    def run(*args):
        return kernel(*args, **options, config=LaunchConfig(groups=groups), interpret=True)

    (out, _), pull = jax.vjp(run, *arrays, start)
    assert out.dtype == jnp.bfloat16
    _, pull_back = jax.vjp(lambda *args: recurrence(*args, **options), *arrays, start)
    wide = (cotangents[0].astype(jnp.float32), cotangents[1])
    assert_close(pull(cotangents), pull_back(wide), 6e-3)


@pytest.mark.parametrize(
    ("B", "T", "N", "K", "F", "H", "feature_map"),
    [
        (16, 2048, 16, 16, 16, 64, "taylor"),
        (1, 32768, 16, 4, 16, 128, "taylor"),
        (1, 32000, 16, 16, 128, 128, "identity"),
    ],
    ids=str,
)
def test_gradients_lower_for_cuda(B, T, N, K, F, H, feature_map):
    def loss(q, k, v):
        out, _ = kernel(
            q, k, v, feature_map=feature_map, scale=F**-0.5, normalize=feature_map == "taylor"
        )
        return out.astype(jnp.float32).sum()

    arrays = [
        jax.ShapeDtypeStruct((B, T, heads, size), jnp.bfloat16)
        for heads, size in ((N, F), (K, F), (K, H))
    ]
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    text = gradient.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def test_a_sequence_is_split_until_the_chip_is_full():
    assert heuristic(B=16, T=2048, N=16, F=16, H=64).groups == 1
    assert heuristic(B=1, T=32768, N=16, F=16, H=64).groups == 16
    assert heuristic(B=1, T=32768, N=16, F=128, H=128).groups == 8
    assert heuristic(B=1, T=100, N=1, F=16, H=64).groups == 2  # no more than there are chunks


@pytest.mark.parametrize("field", ["groups", "stages", "gradient_stages"])
def test_launch_parameters_are_checked(field):
    with pytest.raises(ValueError, match=rf"LaunchConfig.{field}: expected a whole number from 1"):
        LaunchConfig(**{field: 0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"F": 32}, "take the Taylor map of F=16, not F=32"),
        ({"H": 80}, "that 64 divides, not H=80"),
        ({"dtype": jnp.float32}, "take bfloat16, not float32"),
        ({"feature_map": "elu"}, "know the feature maps 'taylor' and 'identity', not 'elu'"),
        ({"feature_map": "identity", "F": 64}, "do not normalise the identity map"),
    ],
)
def test_a_call_that_is_not_served_is_told_why(change, message):
    call = {"F": 16, "H": 64, "dtype": jnp.bfloat16, "feature_map": "taylor"} | change
    x, v = jnp.ones((1, 64, 1, call["F"])), jnp.ones((1, 64, 1, call["H"]))
    q, k, v = (a.astype(call["dtype"]) for a in (x, x, v))
    with pytest.raises(ValueError, match=message):
        kernel(q, k, v, feature_map=call["feature_map"], scale=1.0, normalize=True)


def test_the_op_says_what_the_kernel_needs():
    q = jnp.ones((1, 64, 1, 16), jnp.bfloat16)
    with pytest.raises(ValueError, match="'mosaic_gpu' needs a Hopper GPU"):
        linear_attention(q, q, q, implementation="mosaic_gpu")
