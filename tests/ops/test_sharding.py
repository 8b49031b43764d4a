"""Meshes whose axes are explicit: states, and calls other than the conformance suite's."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lcattn import ops
from lcattn.testing.conformance.compare import assert_close

B, N, H = 2, 4, 8
ROWS = PartitionSpec("data")
CENTROIDS, WEIGHTS = jnp.ones((N, 3, H)), [jnp.ones((N, H, H))]


def neural_memory(x, initial_state):
    gate = x[..., 0]
    return ops.neural_memory(
        x, x, x, gate, gate, gate, WEIGHTS, initial_state=initial_state, return_state=True
    )


def routing_attention(x, initial_state):
    return ops.routing_attention(
        x, x, CENTROIDS, cluster_size=4, initial_state=initial_state, return_state=True
    )


def attend(op, x, initial_state, **options):
    return op(q=x, k=x, v=x, initial_state=initial_state, return_state=True, **options)


STREAMS = {
    # name: (x, state) -> (out, state), and the first state
    "linear": (
        functools.partial(attend, ops.linear_attention),
        lambda: ops.linear_attention_state(B, N, H, H),
    ),
    "agents": (
        functools.partial(attend, ops.agent_attention, agents=jnp.ones((3, N, H))),
        lambda: ops.agent_attention_state(B, N, 3, H),
    ),
    "cores": (
        functools.partial(attend, ops.core_context_attention, group_size=2, window=3),
        lambda: ops.core_context_attention_state(
            B, 16, N, N, H, H, group_size=2, window=3
        ),
    ),
    "delta rule": (
        functools.partial(attend, ops.gated_delta_rule), lambda: jnp.zeros((B, N, H, H)),
    ),
    "memory": (neural_memory, lambda: ops.neural_memory_state(WEIGHTS, B)),
    "routing": (
        routing_attention, lambda: ops.routing_attention_state(B, N, 3, 4, H, H),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STREAMS)
def test_states_stay_where_their_rows_are(name):
    """A scan over tokens has the same types before and after each."""
    call, start = STREAMS[name]
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Explicit,), devices=jax.devices()[:2])

    def place(x):
        rows = ROWS if x.ndim else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, rows))

    def stream(state, tokens):
        return jax.lax.scan(lambda state, x: call(x, state)[::-1], state, tokens)

    tokens = jax.ShapeDtypeStruct(
        (5, B, 1, N, H), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "data"))
    )
    with jax.set_mesh(mesh):
        _, out = jax.eval_shape(stream, jax.tree.map(place, start()), tokens)
    assert out.sharding.spec[1] == "data"


def test_values_and_gradients_are_those_of_one_device():
    """Over batch and heads, of an op whose every step JAX would have to be told about."""
    shape = (B, 17, N, H)
    x, centroids = (
        jax.random.normal(jax.random.key(seed), size) for seed, size in ((0, shape), (1, (N, 3, H)))
    )
    ids = jnp.repeat(jnp.asarray([[0, 1], [2, 5]]), jnp.asarray([6, 11]), axis=1)

    @jax.jit
    def run(x, centroids, ids):
        def attend(x):
            return ops.routing_attention(x, x, centroids, cluster_size=4, segment_ids=ids)

        out, pull_back = jax.vjp(attend, x)
        return out, pull_back(jnp.cos(out))[0]

    expected = run(x, centroids, ids)
    mesh = jax.make_mesh((2, 2), ("data", "heads"), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        specs = PartitionSpec("data", None, "heads"), PartitionSpec("heads"), ROWS
        found = run(*map(jax.device_put, (x, centroids, ids), specs))
    for ours, plain in zip(found, expected, strict=True):
        assert ours.sharding.spec == PartitionSpec("data", None, "heads", None)
        assert_close("", ours, plain, 2e-5)
