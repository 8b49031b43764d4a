"""Which form of an op a call takes unasked, on machines that are not here."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from lcattn import ops
from lcattn.ops import dispatch


class Chosen(Exception):
    """Raised in the place of running what was chosen."""


@pytest.fixture
def chosen(monkeypatch):
    """A function of an op and its call: the name of what one Hopper GPU would run."""

    def choose(op, name, **call):
        assert name is None
        raise Chosen(dispatch.best(op, **call))

    def run(op, *arrays, **options):
        with pytest.raises(Chosen) as found:
            jax.eval_shape(functools.partial(op, **options), *arrays)
        return str(found.value)

    monkeypatch.setattr(dispatch, "choose", choose)
    monkeypatch.setattr(dispatch, "default_platform", lambda: "gpu")
    monkeypatch.setattr(dispatch, "on_hopper", lambda: True)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    return run


def heads(B, T, H=64):
    return jax.ShapeDtypeStruct((B, T, 1, H), jnp.bfloat16)


def gated(q, **options):
    return ops.gated_linear_attention(q, q, q, q, **options)


def memory(q):
    gate = q[..., 0]
    return ops.neural_memory(q, q, q, gate, gate, gate, [jnp.zeros((1, 64, 64))])


KERNELS = {
    # op of one array, tokens, rows that are too many for one axis of a grid
    "linear": (lambda q: ops.linear_attention(q, q, q, feature_map="elu"), 256, 2**16),
    "gated": (gated, 256, 2**14),
    "softplus": (lambda q: ops.softplus_attention(q, q, q), 1024, 2**16),
    "memory": (memory, 2048, 2**16),
    "window": (lambda q: ops.softmax_attention(q, q, q, window=9, sinks=1), 4096, 2**16),
    "cores": (lambda q: ops.core_context_attention(q, q, q), 4096, 2**16),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_run_unasked_only_as_many_rows_as_a_grid_holds(chosen, name):
    op, T, too_many = KERNELS[name]
    assert chosen(op, heads(1, T)) in {"mosaic_gpu", "block_sparse"}
    assert chosen(op, heads(0, T)) == "xla"
    assert chosen(op, heads(too_many, T)) == "xla"


@pytest.mark.parametrize("name", KERNELS)
def test_inside_shard_map_kernels_run_only_when_named(chosen, name):
    """JAX raises where it checks how results vary and cannot: by default, on one device too."""
    op, T, _ = KERNELS[name]
    mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=jax.devices()[:1])
    rows = PartitionSpec("data")
    sharded = jax.shard_map(op, mesh=mesh, in_specs=rows, out_specs=rows)
    with jax.set_mesh(mesh):
        assert chosen(op, heads(1, T)) in {"mosaic_gpu", "block_sparse"}
        assert chosen(sharded, heads(1, T)) == "xla"


@pytest.mark.parametrize("name", KERNELS)
def test_with_64_bits_xla_serves_every_call(chosen, name):
    """Kernels are traced with indices of 32 bits, and so are their gradients, later."""
    op, T, _ = KERNELS[name]
    with jax.enable_x64(True):
        assert chosen(op, heads(1, T)) == "xla"


@pytest.mark.parametrize(("platform", "name"), [("gpu", "mosaic_gpu"), ("tpu", "mosaic_tpu")])
def test_a_named_kernel_says_that_64_bits_are_too_many(monkeypatch, platform, name):
    monkeypatch.setattr(dispatch, "default_platform", lambda: platform)
    monkeypatch.setattr(dispatch, "on_hopper", lambda: platform == "gpu")
    q = jnp.zeros((1, 256, 1, 64), jnp.bfloat16)
    with jax.enable_x64(True), pytest.raises(ValueError, match=f"'{name}' needs jax_enable_x64 to"):
        ops.linear_attention(q, q, q, feature_map="elu", implementation=name)


@pytest.mark.parametrize("name", KERNELS)
def test_explicit_axes_of_one_device_are_no_hindrance(chosen, name):
    op, T, _ = KERNELS[name]
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    rows = jax.NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        placed = jax.ShapeDtypeStruct((1, T, 1, 64), jnp.bfloat16, sharding=rows)
        assert chosen(op, placed) in {"mosaic_gpu", "block_sparse"}


def test_on_several_devices_kernels_run_only_when_named(chosen, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert {chosen(op, heads(1, T)) for op, T, _ in KERNELS.values()} == {"xla"}


def test_wide_values_are_parts_of_rows(chosen):
    """Each 64 of them have a place in the grid of linear attention."""

    def linear(q, v):
        return ops.linear_attention(q, q, v, feature_map="identity")

    assert chosen(linear, heads(2**14, 256), heads(2**14, 256)) == "mosaic_gpu"
    assert chosen(linear, heads(2**14, 256), heads(2**14, 256, H=256)) == "xla"


def test_the_kernels_of_gated_linear_attention_divide_by_the_scale(chosen):
    assert chosen(functools.partial(gated, scale=-1.0), heads(1, 256)) == "mosaic_gpu"
    assert chosen(functools.partial(gated, scale=0.0), heads(1, 256)) == "xla"
