"""JAX transformations: each must give what the plain call gives, in float32."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec

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
    devices = jax.device_count()
    heads = math.gcd(sizes.get("K", 1), devices)
    batch = math.gcd(sizes["B"], devices // heads)
    mesh = jax.make_mesh(
        (batch, heads), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[: batch * heads],
    )  # fmt: skip
    mesh_axes = {"B": "batch", "N": "heads", "K": "heads"}

    def spec(axes):
        return PartitionSpec(*(mesh_axes.get(letter) for letter in axes.split()))

    sharded = jax.shard_map(
        lambda inputs: case(inputs, implementation=implementation),
        mesh=mesh,
        in_specs=({name: spec(axes) for name, axes in case.inputs.items()},),
        out_specs=spec(case.output),
    )
    inputs = case.make_inputs(sizes)
    run = jax.jit(lambda inputs, cotangent: value_and_gradients(sharded, inputs, cotangent))
    found = run(cast(inputs, "float32"), jnp.float32(make_cotangent(case, inputs)))
    expected = execute(case, implementation, inputs, dtype="float32")
    assert_close("(output, gradients)", found, tuple(expected), _TOLERANCE)


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
