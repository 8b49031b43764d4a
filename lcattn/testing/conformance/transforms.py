"""JAX transformations: each must give what the plain call gives."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from lcattn.testing.conformance.cases import OpCase, Sizes
from lcattn.testing.conformance.compare import assert_close
from lcattn.testing.conformance.execution import (
    execute,
    make_cotangent,
    value_and_gradients,
)

_TOLERANCE = 2e-5  # float32, of another order of summation


def _prepare(case: OpCase, implementation: str | None, sizes: Sizes):
    inputs = case.make_inputs(sizes)
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in inputs.items()}
    cotangent = jnp.asarray(make_cotangent(case, inputs), jnp.float32)
    expected = execute(case, implementation, inputs, dtype="float32")
    return arrays, cotangent, expected


def check_eager(case: OpCase, implementation: str | None, sizes: Sizes) -> None:
    """Without `jit`, operation by operation."""
    arrays, _, expected = _prepare(case, implementation, sizes)
    out = case(arrays, implementation=implementation)
    assert_close("output", out, expected.out, _TOLERANCE)


def check_compiled_once(case: OpCase, implementation: str | None, sizes: Sizes) -> None:
    """A second call of the same shapes traces nothing and moves nothing between host and device."""
    arrays, cotangent, expected = _prepare(case, implementation, sizes)
    traces = 0

    @jax.jit
    def run(inputs, cotangent):
        nonlocal traces
        traces += 1
        return value_and_gradients(
            lambda inputs: case(inputs, implementation=implementation), inputs, cotangent
        )

    run(arrays, cotangent)
    with jax.transfer_guard("disallow"):
        out, _ = jax.block_until_ready(run(arrays, cotangent))
    assert_close("output", out, expected.out, _TOLERANCE)
    if traces != 1:
        raise AssertionError(f"traced {traces} times for one shape")


def check_mapped(case: OpCase, implementation: str | None, sizes: Sizes) -> None:
    """`vmap` over a new axis, `checkpoint`ed, in a `scan`: values and gradients."""
    arrays, cotangent, expected = _prepare(case, implementation, sizes)
    factors = jnp.array([1.0, 0.5], jnp.float32)

    @jax.checkpoint
    def mapped(inputs):
        return jax.vmap(lambda inputs: case(inputs, implementation=implementation))(inputs)

    @jax.jit
    def run(stacked, cotangents):
        def step(carry, xs):
            return carry + 1, value_and_gradients(mapped, *xs)

        return jax.lax.scan(step, 0, (stacked, cotangents))[1]

    def stack(x, outer=factors, inner=factors):
        return jnp.stack([jnp.stack([a * b * x for b in inner]) for a in outer])

    ones = jnp.ones(2, jnp.float32)
    out, gradients = run(jax.tree.map(stack, arrays), stack(cotangent, ones, ones))
    for i, j in np.ndindex(2, 2):
        if i == j == 0:
            single = expected
        else:
            inputs = {k: factors[i] * factors[j] * x for k, x in arrays.items()}
            single = execute(
                case, implementation, inputs, cotangent=np.asarray(cotangent), dtype="float32"
            )
        name = f"element {i, j}: "
        assert_close(f"{name}output", out[i, j], single.out, _TOLERANCE)
        found = jax.tree.map(lambda g, at=(i, j): g[at], gradients)
        assert_close(f"{name}gradient of ", found, single.gradients, _TOLERANCE)


def check_sharded(case: OpCase, implementation: str | None, sizes: Sizes) -> None:
    """`shard_map` over batch and heads, with its checks on: values and gradients."""
    arrays, cotangent, expected = _prepare(case, implementation, sizes)
    mesh_axes = {"B": "batch", "N": "heads", "K": "heads"}
    heads = np.gcd.reduce([sizes.get("K", 1), jax.device_count()])
    shape = (min(sizes["B"], jax.device_count() // int(heads)), int(heads))
    mesh = jax.make_mesh(
        shape, ("batch", "heads"), axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[: shape[0] * shape[1]],
    )  # fmt: skip

    def spec(axes):
        return PartitionSpec(*(mesh_axes.get(letter) for letter in axes.split()))

    def call(inputs):
        return case(inputs, implementation=implementation)

    sharded = jax.shard_map(
        call,
        mesh=mesh,
        in_specs=({name: spec(axes) for name, axes in case.inputs.items()},),
        out_specs=spec(case.output),
    )
    run = jax.jit(lambda inputs, cotangent: value_and_gradients(sharded, inputs, cotangent))
    out, gradients = run(arrays, cotangent)
    assert_close("output", out, expected.out, _TOLERANCE)
    assert_close("gradient of ", gradients, expected.gradients, _TOLERANCE)


def check_x64(case: OpCase, implementation: str | None, sizes: Sizes) -> None:
    """With x64 enabled, float32 inputs give the same float32 outputs."""
    inputs = {k: x.astype(np.float32) for k, x in case.make_inputs(sizes).items()}
    expected = execute(case, implementation, inputs, dtype="float32")
    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(x) for name, x in inputs.items()}
        out = jax.jit(lambda inputs: case(inputs, implementation=implementation))(arrays)
    if out.dtype != jnp.float32:
        raise AssertionError(f"output dtype {out.dtype} from float32 inputs")
    assert_close("output", out, expected.out, _TOLERANCE)
