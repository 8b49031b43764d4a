"""Values against the oracle, gradients against the plainest implementation and the oracle."""

import jax
import jax.numpy as jnp
import numpy as np

from lcattn.testing.conformance.cases import OpCase, Sizes
from lcattn.testing.conformance.compare import assert_close, assert_finite
from lcattn.testing.conformance.execution import (
    as_ids,
    cast,
    evaluate,
    execute,
    make_cotangent,
    padded,
    program,
    repeated,
)


def check_values(case: OpCase, implementation: str | None, sizes: Sizes) -> None:
    """Outputs equal the oracle's."""
    inputs = case.make_inputs(sizes)
    if implementation == case.implementations[0]:
        # `check_packing` needs its gradients at the same lengths, so that program is there anyway.
        out = execute(case, implementation, inputs).out
    else:
        out = evaluate(case, implementation, inputs)
    expected = case.oracle(inputs, None, causal=True)
    assert_close("output", out, expected, case.value_tolerance[case.widest_dtype])


def check_gradients(
    case: OpCase,
    implementation: str | None,
    sizes: Sizes,
    *,
    causal: bool = True,
    packed: bool = False,
) -> None:
    """Outputs equal the oracle's, all gradients the plainest implementation's.

    The gradients of the plainest one are held against finite differences of the oracle.
    """
    inputs = case.make_inputs(sizes)
    ids = padded(sizes) if packed else None
    result = execute(case, implementation, inputs, segment_ids=ids, causal=causal)
    expected = case.oracle(inputs, ids, causal=causal)
    assert_close("output", result.out, expected, case.value_tolerance[case.widest_dtype])
    plainest = case.implementations[0]
    if implementation != plainest:
        expected = execute(case, plainest, inputs, segment_ids=ids, causal=causal).gradients
        tolerance = case.gradient_tolerance[case.widest_dtype]
        assert_close("gradient of ", result.gradients, expected, tolerance)
        return
    cotangent = make_cotangent(case, inputs)
    for name, x in inputs.items():
        direction = np.random.default_rng(2).standard_normal(x.shape)
        step = 1e-5

        def loss(size, name=name, x=x, direction=direction):
            moved = inputs | {name: x + size * direction}
            return np.sum(cotangent * case.oracle(moved, ids, causal=causal))

        slope = (loss(step) - loss(-step)) / (2 * step)
        found = np.sum(result.gradients[name].astype(np.float64) * direction)
        # Finite differences of float64 hold about nine digits of the sum's terms.
        tolerance = max(1e-6, 10 * case.gradient_tolerance[case.widest_dtype])
        assert_close(f"slope along {name}", found, slope, tolerance)


def check_grouped_queries(case: OpCase, implementation: str | None, sizes: Sizes) -> None:
    """Shared key heads equal the same heads spelled out; their gradients add up."""
    group = sizes["N"] // sizes["K"]
    inputs = case.make_inputs(sizes)
    shared = execute(case, implementation, inputs)
    spelled = execute(case, implementation, repeated(case, inputs, group))
    dtype = case.widest_dtype
    assert_close("output", shared.out, spelled.out, case.value_tolerance[dtype])
    for name, gradient in spelled.gradients.items():
        axis = case.axis(name, "K")
        if axis is not None:
            heads = (*gradient.shape[:axis], sizes["K"], group, *gradient.shape[axis + 1 :])
            gradient = gradient.reshape(heads).sum(axis + 1)
        found = shared.gradients[name]
        assert_close(f"gradient of {name}", found, gradient, case.gradient_tolerance[dtype])


def check_sizes(case: OpCase, implementation: str | None, sizes: Sizes, *, gradients: bool) -> None:
    """Ragged lengths and head sizes in float32 equal the oracle; gradients, if any, are finite."""
    inputs = case.make_inputs(sizes)
    if gradients:
        result = execute(case, implementation, inputs, dtype="float32")
        out = result.out
        assert_finite("gradient of ", result.gradients)
    else:
        out = evaluate(case, implementation, inputs, dtype="float32")
    expected = case.oracle(inputs, None, causal=True)
    assert_close("output", out, expected, case.value_tolerance["float32"])


def check_empty(case: OpCase, implementation: str | None, sizes: Sizes) -> None:
    """No rows give no rows, packed, and gradients; traced only, as shapes are what goes wrong."""
    inputs, ids = case.make_inputs(sizes), np.zeros((0, sizes["T"]))
    cotangent = make_cotangent(case, inputs)
    arguments = cast(inputs, "float32"), as_ids(ids), jnp.float32(cotangent)
    out, _ = jax.eval_shape(program(case, implementation), *arguments)
    if out.shape[0]:
        raise AssertionError(f"output shape {out.shape}, expected no rows")


def check_low_precision(
    case: OpCase, implementation: str | None, sizes: Sizes, *, dtype: str
) -> None:
    """Values and gradients of narrow inputs are close to those of the same inputs in float64."""
    narrow = jnp.dtype(dtype)
    inputs = {k: x.astype(narrow).astype(np.float64) for k, x in case.make_inputs(sizes).items()}
    cotangent = make_cotangent(case, inputs).astype(narrow).astype(np.float64)
    result = execute(case, implementation, inputs, cotangent=cotangent, dtype=dtype)
    if result.out.dtype != narrow:
        raise AssertionError(f"output dtype {result.out.dtype}, expected that of the inputs")
    exact = execute(case, case.implementations[0], inputs, cotangent=cotangent)
    assert_close("output", result.out, exact.out, case.value_tolerance[dtype])
    tolerance = case.gradient_tolerance[dtype]
    assert_close("gradient of ", result.gradients, exact.gradients, tolerance)


def check_extremes(case: OpCase, implementation: str | None, sizes: Sizes) -> None:
    """Huge bfloat16 and tiny float32 inputs give finite values and gradients."""
    inputs = case.make_inputs(sizes)
    for dtype, size in (("bfloat16", 1e4), ("float32", 1e-30)):
        scaled = {name: size * x for name, x in inputs.items()}
        result = execute(case, implementation, scaled, dtype=dtype)
        assert_finite(f"inputs of {size:g} in {dtype}: output", result.out)
        assert_finite(f"inputs of {size:g} in {dtype}: gradient of ", result.gradients)
