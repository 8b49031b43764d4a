"""What tokens may know of each other: causality, packing, padding, the state between calls."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcattn.testing.conformance.cases import OpCase, Sizes
from lcattn.testing.conformance.compare import assert_close, assert_identical, assert_zero
from lcattn.testing.conformance.execution import (
    along,
    as_ids,
    cast,
    documents,
    execute,
    make_cotangent,
    padded,
    tokens,
    value_and_gradients,
)


def check_causality(case: OpCase, implementation: str | None, sizes: Sizes) -> None:
    """Outputs before a token do not change with it by a bit, and have no gradient towards it."""
    inputs = case.make_inputs(sizes)
    before = execute(case, implementation, inputs)
    for t in sorted({1, case.chunk, sizes["T"] - 1}):
        changed = inputs | {
            name: np.concatenate([x[:, :t], -3 * x[:, t:]], axis=1)
            for name, x in tokens(case, inputs).items()
        }
        after = execute(case, implementation, changed)
        assert_identical(f"outputs before token {t}", after.out[:, :t], before.out[:, :t])
        cotangent = make_cotangent(case, inputs)
        cotangent[:, t:] = 0
        gradients = execute(case, implementation, inputs, cotangent=cotangent).gradients
        for name, gradient in tokens(case, gradients).items():
            assert_zero(f"gradient of {name} from token {t} on", gradient[:, t:])


def check_packing(
    case: OpCase, implementation: str | None, sizes: Sizes, *, lengths: list[int]
) -> None:
    """Documents in one row equal the documents run apart: values and all gradients.

    They are run apart by the plainest implementation, which is compiled for their lengths once.
    """
    inputs = case.make_inputs(sizes)
    cotangent = make_cotangent(case, inputs)
    whole = execute(case, implementation, inputs, segment_ids=documents(lengths, sizes))
    ends = np.cumsum(lengths)
    pieces = [slice(end - n, end) for n, end in zip(lengths, ends, strict=True)]
    apart = [
        execute(
            case,
            case.implementations[0],
            along(case, inputs, "T", piece),
            cotangent=cotangent[:, piece],
        )
        for piece in pieces
    ]
    dtype = case.widest_dtype
    out = np.concatenate([piece.out for piece in apart], axis=1)
    assert_close("output", whole.out, out, case.value_tolerance[dtype])
    for name, gradient in whole.gradients.items():
        parts = [piece.gradients[name] for piece in apart]
        expected = sum(parts) if case.axis(name, "T") is None else np.concatenate(parts, axis=1)
        assert_close(f"gradient of {name}", gradient, expected, case.gradient_tolerance[dtype])


def check_padding(
    case: OpCase, implementation: str | None, sizes: Sizes, *, causal: bool = True
) -> None:
    """Padding changes nothing, gets zeros and has zero gradients; so does a row of nothing else."""
    inputs = case.make_inputs(sizes)
    ids = padded(sizes)
    result = execute(case, implementation, inputs, segment_ids=ids, causal=causal)
    assert_zero("output at padding", result.out[ids < 0])
    for name, gradient in tokens(case, result.gradients).items():
        assert_zero(f"gradient of {name} at padding", gradient[ids < 0])

    changed = {name: x.copy() for name, x in inputs.items()}
    for x in tokens(case, changed).values():
        x[ids < 0] = 100.0
    after = execute(case, implementation, changed, segment_ids=ids, causal=causal)
    assert_identical("output after padding changed", after.out, result.out)
    assert_identical("gradient after padding changed", after.gradients, result.gradients)


def check_state(
    case: OpCase, implementation: str | None, sizes: Sizes, *, packed: bool = False
) -> None:
    """Two calls joined by the state equal one: outputs, final state, and gradients through both."""
    inputs = case.make_inputs(sizes)
    T, cut = sizes["T"], case.chunk + 1
    ids = documents([T // 3, T - T // 3], sizes) if packed else None
    if ids is not None:
        ids[:, cut - 2 : cut] = -1  # the first call ends in padding, amid a document

    dtype = case.widest_dtype
    with jax.enable_x64(dtype == "float64"):
        (found, found_gradients), (expected, gradients) = (
            run(cast(inputs, dtype), as_ids(ids))
            for run in (_two_calls(case, implementation, cut), _one_call(case))
        )
    assert_close("(output, state)", found, expected, case.value_tolerance[dtype])
    tolerance = case.gradient_tolerance[dtype]
    assert_close("gradient of ", found_gradients, gradients, tolerance)


@functools.cache
def _one_call(case: OpCase) -> Callable[..., Any]:
    def call(inputs, ids):
        return case(
            inputs, segment_ids=ids, return_state=True, implementation=case.implementations[0]
        )

    return _differentiated(call)


def _two_calls(case: OpCase, implementation: str | None, cut: int) -> Callable[..., Any]:
    def call(inputs, ids):
        out, state = [], None
        for piece in (slice(cut), slice(cut, None)):
            y, state = case(
                along(case, inputs, "T", piece),
                segment_ids=None if ids is None else ids[:, piece],
                initial_state=state,
                return_state=True,
                implementation=implementation,
            )
            out.append(y)
        return jnp.concatenate(out, axis=1), state

    return _differentiated(call)


def _differentiated(call: Callable[..., Any]) -> Callable[..., Any]:
    """`(inputs, ids) -> (call(inputs, ids), gradients)` for random cotangents."""

    @jax.jit
    def run(inputs, ids):
        with jax.default_matmul_precision("highest"):
            shapes = jax.eval_shape(call, inputs, ids)
            rng = np.random.default_rng(1)
            cotangent = jax.tree.map(
                lambda s: jnp.asarray(rng.standard_normal(s.shape), s.dtype), shapes
            )
            return value_and_gradients(lambda inputs: call(inputs, ids), inputs, cotangent)

    return run
