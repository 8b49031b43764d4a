"""The Hopper kernels without a GPU: simulated, against the XLA form, and lowered for CUDA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcattn.ops import dispatch, linear_attention, linear_attention_state
from pallas_kernels.linear_attention import mosaic_gpu
from pallas_kernels.linear_attention.config import LaunchConfig, heuristic

kernel = mosaic_gpu.linear_attention


# A document may fill a chunk, begin with it or inside, and go on from one group to the next.
PACKED = [[2] * 64 + [3] * 74 + [-1] * 10 + [5] + [6] * 91]
PADDED = [[-1] * 3 + [2] * 30 + [3] * 67, [-1] * 100]

CASES = {
    # name: (B, T, N, K, F, H), options, documents, groups
    "taylor, packed": (
        (1, 240, 1, 1, 16, 64), {"feature_map": "taylor", "scale": 0.3}, PACKED, 2,
    ),
    "taylor, ragged, grouped queries": (
        (1, 100, 2, 1, 16, 64), {"feature_map": "taylor"}, None, 2,
    ),
    "taylor, plain, blocks of values": (
        (1, 64, 1, 1, 16, 128), {"feature_map": "taylor", "normalize": False}, None, 1,
    ),
    "elu, packed, padded": ((2, 100, 1, 1, 64, 64), {"feature_map": "elu"}, PADDED, 2),
    "elu, ragged, wide": ((1, 100, 1, 1, 128, 64), {"feature_map": "elu"}, None, 1),
    "identity, packed, grouped queries": (
        (1, 240, 2, 1, 64, 64), {"feature_map": "identity", "scale": 0.5}, PACKED, 1,
    ),
    "identity, in groups": ((1, 128, 1, 1, 64, 64), {"feature_map": "identity"}, None, 2),
}  # fmt: skip


@pytest.fixture
def simulated(monkeypatch):
    """Makes the op run the kernels in the simulator, with as many groups as a case says."""
    run = mosaic_gpu.linear_attention

    def simulate(groups):
        config = LaunchConfig(groups=groups)
        kernel = functools.partial(run, config=config, interpret=True)
        monkeypatch.setattr(mosaic_gpu, "linear_attention", kernel)
        monkeypatch.setattr(dispatch, "on_hopper", lambda: True)

    return simulate


def inputs(B, T, N, K, F, H, feature_map, normalize=None):
    """q, k, v, an initial state; cotangents of the output and of the final state."""
    draw = np.random.default_rng(0)

    def normal(*shape, dtype=jnp.bfloat16):
        return jnp.asarray(draw.normal(size=shape), dtype)

    empty = linear_attention_state(B, K, F, H, feature_map=feature_map, normalize=normalize)

    def state():
        return jax.tree.map(lambda x: normal(*x.shape, dtype=jnp.float32), empty)

    start = state()
    if start.normalizer is not None:  # weights are positive, so the past has a positive sum
        first = jnp.zeros_like(start.normalizer).at[:, :, 0].set(20.0)
        totals = first if feature_map == "taylor" else 9 + start.normalizer**2
        start = dataclasses.replace(start, normalizer=totals)
    arrays = normal(B, T, N, F), normal(B, T, K, F), normal(B, T, K, H), start
    return arrays, (normal(B, T, N, H), state())


def values_and_gradients(implementation, name, widen=False):
    """The output and the final state, then the gradients of q, k, v and the initial state."""
    shape, options, documents, _ = CASES[name]
    case = inputs(*shape, options["feature_map"], options.get("normalize"))
    if widen:
        case = jax.tree.map(lambda x: x.astype(jnp.float32), case)

    def run(q, k, v, start):
        return linear_attention(
            q, k, v, **options, segment_ids=None if documents is None else jnp.asarray(documents),
            initial_state=start, return_state=True, implementation=implementation,
        )  # fmt: skip

    values, pull = jax.vjp(run, *case[0])
    return values, pull(case[1])


def assert_close(got, want, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("name", CASES)
def test_values_states_and_every_gradient_agree_with_the_xla_form(name, simulated):
    simulated(CASES[name][3])
    values, gradients = values_and_gradients("mosaic_gpu", name)
    wanted_values, wanted_gradients = values_and_gradients("xla", name, widen=True)
    assert values[0].dtype == jnp.bfloat16
    assert_close(values, wanted_values, 5e-3)
    assert_close(gradients, wanted_gradients, 8e-3)
    documents = CASES[name][2]
    if documents is not None:
        assert not np.asarray(values[0])[np.asarray(documents) < 0].any()


@pytest.mark.parametrize(
    ("B", "T", "N", "K", "F", "H", "feature_map", "normalize", "packed"),
    [
        (16, 2048, 16, 16, 16, 64, "taylor", True, False),
        (1, 32768, 16, 4, 16, 128, "taylor", True, True),
        (1, 32000, 16, 16, 128, 128, "identity", True, True),
        (1, 32000, 16, 16, 128, 128, "identity", False, False),
    ],
    ids=str,
)
def test_gradients_lower_for_cuda(B, T, N, K, F, H, feature_map, normalize, packed):
    def loss(q, k, v, documents):
        out, _ = kernel(
            q, k, v, None, documents, feature_map=feature_map, scale=F**-0.5, normalize=normalize
        )
        return out.astype(jnp.float32).sum()

    arrays = [
        jax.ShapeDtypeStruct((B, T, heads, size), jnp.bfloat16)
        for heads, size in ((N, F), (K, F), (K, H))
    ]
    documents = jax.ShapeDtypeStruct((B, T), jnp.int32) if packed else None
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    text = gradient.trace(*arrays, documents).lower(lowering_platforms=("cuda",)).as_text()
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
        ({"feature_map": "identity", "F": 32}, "the identity map of F=64 or 128, not F=32"),
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


def test_the_kernel_runs_unasked_from_the_shortest_length_that_was_timed(monkeypatch):
    monkeypatch.setattr(dispatch, "on_hopper", lambda: True)
    monkeypatch.setattr(jax, "device_count", lambda: 1)

    def takes_it(T, F, **options):
        q, v = (jax.ShapeDtypeStruct((1, T, 1, H), jnp.bfloat16) for H in (F, 64))
        run = functools.partial(linear_attention, **options)
        return "linear_attention_outputs" in str(jax.make_jaxpr(run)(q, q, v))

    assert takes_it(256, 16)
    assert takes_it(256, 64, feature_map="elu", segment_ids=jnp.zeros((1, 256), jnp.int32))
    assert not takes_it(128, 16)
    assert not takes_it(256, 16, chunk_size=32)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert not takes_it(256, 16)
