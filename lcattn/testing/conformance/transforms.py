"""JAX transformations: each must give what the plain call gives, in float32."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lcattn.testing.conformance.cases import OpCase, Sizes
from lcattn.testing.conformance.compare import assert_close, assert_identical
from lcattn.testing.conformance.execution import (
    cast,
    execute,
    make_cotangent,
    program,
    value_and_gradients,
)

_TOLERANCE = 2e-5  # of another order of summation


def check_eager(case: OpCase, implementation: str | None, sizes: Sizes) -> None:
    """Without `jit`, operation by operation."""
    inputs = case.make_inputs(sizes)
    out = case(cast(inputs, "float32"), implementation=implementation)
    expected = execute(case, implementation, inputs, dtype="float32")
    assert_close("output", out, expected.out, _TOLERANCE)


def check_compiled_once(case: OpCase, implementation: str | None, sizes: Sizes) -> None:
    """A second call of the same shapes traces nothing and moves nothing between host and device."""
    inputs = case.make_inputs(sizes)
    arrays, cotangent = cast(inputs, "float32"), jnp.float32(make_cotangent(case, inputs))
    run = program(case, implementation)
    first = run(arrays, None, cotangent)
    with jax.no_tracing(), jax.transfer_guard("disallow"):
        second = jax.block_until_ready(run(arrays, None, cotangent))
    assert_identical("result", second, first)


def check_mapped(case: OpCase, implementation: str | None, sizes: Sizes) -> None:
    """`vmap` over a new axis, under `checkpoint`, in a `scan`: values and gradients."""
    samples = [case.make_inputs(sizes, seed) for seed in range(4)]
    cotangent = make_cotangent(case, samples[0])

    @jax.checkpoint
    def mapped(inputs):
        return jax.vmap(lambda inputs: case(inputs, implementation=implementation))(inputs)

    @jax.jit
    def run(inputs, cotangent):
        def step(_, inputs):
            return None, value_and_gradients(mapped, inputs, cotangent)

        return lax.scan(step, None, inputs)[1]

    stacked = {
        name: jnp.float32(np.reshape([s[name] for s in samples], (2, 2, *x.shape)))
        for name, x in samples[0].items()
    }
    out, gradients = run(stacked, jnp.float32(np.stack([cotangent, cotangent])))
    for i, sample in enumerate(samples):
        expected = execute(case, implementation, sample, dtype="float32")
        found = jax.tree.map(lambda x, i=i: x[i // 2, i % 2], (out, gradients))
        assert_close(f"sample {i}: (output, gradients)", found, tuple(expected), _TOLERANCE)


def check_sharded(case: OpCase, implementation: str | None, sizes: Sizes) -> None:
    """`shard_map` over batch and heads on all devices, with its checks on: values and gradients."""
    sharded = jax.shard_map(
        lambda inputs: case(inputs, implementation=implementation),
        mesh=_mesh(sizes, AxisType.Auto),
        in_specs=({name: _spec(axes) for name, axes in case.inputs.items()},),
        out_specs=_spec(case.output),
    )
    inputs = case.make_inputs(sizes)
    run = jax.jit(lambda inputs, cotangent: value_and_gradients(sharded, inputs, cotangent))
    found = run(cast(inputs, "float32"), jnp.float32(make_cotangent(case, inputs)))
    expected = execute(case, implementation, inputs, dtype="float32")
    assert_close("(output, gradients)", found, tuple(expected), _TOLERANCE)


def check_explicit(case: OpCase, implementation: str | None, sizes: Sizes) -> None:
    """Packed rows over explicit axes of batch and heads: outputs are sharded so, gradients exist.

    Traced only: that is where JAX refuses. Compilers then do what they do with automatic axes.
    """
    mesh = _mesh(sizes, AxisType.Explicit)

    def placed(axes, dtype=jnp.float32):
        shape = tuple(sizes[letter] for letter in axes.split())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, _spec(axes)))

    def run(inputs, ids):
        out, pull_back = jax.vjp(
            lambda inputs: case(inputs, segment_ids=ids, implementation=implementation), inputs
        )
        return out, pull_back(out)

    inputs = {name: placed(axes) for name, axes in case.inputs.items()}
    with jax.set_mesh(mesh):
        out, _ = jax.eval_shape(run, inputs, placed("B T", jnp.int32))
    if out.sharding.spec != _spec(case.output):
        found = f"sharded as {out.sharding.spec}, expected {_spec(case.output)}"
        raise AssertionError(f"output {found}")


def _mesh(sizes: Sizes, axis_type: AxisType) -> Mesh:
    """Devices for batch and heads, as many as divide both."""
    devices = jax.device_count()
    heads = math.gcd(sizes.get("K", 1), devices)
    batch = math.gcd(sizes["B"], devices // heads)
    return jax.make_mesh(
        (batch, heads), ("batch", "heads"), (axis_type,) * 2, devices=jax.devices()[: batch * heads]
    )


def _spec(axes: str) -> PartitionSpec:
    """Where arrays of these axes lie on that mesh."""
    mesh_axes = {"B": "batch", "N": "heads", "K": "heads"}
    return PartitionSpec(*(mesh_axes.get(letter) for letter in axes.split()))


def check_x64(case: OpCase, implementation: str | None, sizes: Sizes) -> None:
    """With x64 enabled, float32 inputs give the same float32 outputs."""
    inputs = case.make_inputs(sizes)
    expected = execute(case, implementation, inputs, dtype="float32")
    with jax.enable_x64(True):
        run = jax.jit(lambda inputs: case(inputs, implementation=implementation))
        out = run(cast(inputs, "float32"))
    if out.dtype != jnp.float32:
        raise AssertionError(f"output dtype {out.dtype}, expected float32")
    assert_close("output", out, expected.out, _TOLERANCE)
