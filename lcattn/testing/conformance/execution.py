"""Running a case: one compiled program gives outputs and gradients to every check."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcattn.testing.conformance.cases import Inputs, OpCase, Sizes


class Result(NamedTuple):
    """What came out, as NumPy arrays of the dtype they were computed in."""

    out: np.ndarray
    gradients: dict[str, np.ndarray]


def execute(
    case: OpCase,
    implementation: str | None,
    inputs: Inputs,
    *,
    segment_ids: np.ndarray | None = None,
    cotangent: np.ndarray | None = None,
    causal: bool = True,
    dtype: str | None = None,
) -> Result:
    """Outputs, and gradients of `sum(out * cotangent)` (default: `make_cotangent`).

    Compiled once for each case, implementation and shape, so checks that agree on shapes share it.
    """
    dtype = dtype or case.widest_dtype
    with jax.enable_x64(dtype == "float64"):
        if cotangent is None:
            cotangent = make_cotangent(case, inputs)
        out, gradients = program(case, implementation, causal)(
            cast(inputs, dtype), as_ids(segment_ids), jnp.asarray(cotangent, dtype)
        )
        return Result(np.asarray(out), {k: np.asarray(g) for k, g in gradients.items()})


def evaluate(
    case: OpCase, implementation: str | None, inputs: Inputs, *, dtype: str | None = None
) -> np.ndarray:
    """Outputs only: quicker to compile."""
    dtype = dtype or case.widest_dtype
    with jax.enable_x64(dtype == "float64"):
        return np.asarray(_forward(case, implementation)(cast(inputs, dtype)))


@functools.cache
def program(case: OpCase, implementation: str | None, causal: bool = True) -> Callable[..., Any]:
    """The jitted `(inputs, segment_ids, cotangent) -> (out, gradients)`."""

    @jax.jit
    def run(inputs, segment_ids, cotangent):
        with jax.default_matmul_precision("highest"):
            return value_and_gradients(
                lambda inputs: case(
                    inputs, segment_ids=segment_ids, causal=causal, implementation=implementation
                ),
                inputs,
                cotangent,
            )

    return run


@functools.cache
def _forward(case: OpCase, implementation: str | None) -> Callable[..., Any]:
    @jax.jit
    def run(inputs):
        with jax.default_matmul_precision("highest"):
            return case(inputs, implementation=implementation)

    return run


def cast(inputs: Inputs, dtype: str) -> dict[str, jax.Array]:
    """JAX arrays of a dtype."""
    return {name: jnp.asarray(x, dtype) for name, x in inputs.items()}


def value_and_gradients(function: Any, inputs: Any, cotangent: Any) -> tuple[Any, Any]:
    """`function(inputs)` and the pull-back of a cotangent."""
    out, pull_back = jax.vjp(function, inputs)
    return out, pull_back(jax.tree.map(lambda c, o: c.astype(o.dtype), cotangent, out))[0]


def make_cotangent(case: OpCase, inputs: Inputs, seed: int = 1) -> np.ndarray:
    """Standard normal, in the shape of the output."""
    shape = jax.eval_shape(
        lambda inputs: case(inputs),
        {name: jax.ShapeDtypeStruct(x.shape, jnp.float32) for name, x in inputs.items()},
    ).shape
    return np.random.default_rng(seed).standard_normal(shape)


def as_ids(segment_ids: np.ndarray | None) -> jax.Array | None:
    """Ids as the int32 array that ops take."""
    return None if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)


def documents(lengths: list[int], sizes: Sizes) -> np.ndarray:
    """Ids of documents of these lengths; each row numbers them differently, always upwards."""
    counted = np.repeat(np.arange(len(lengths)), lengths)
    return np.stack([counted * (1 + b) + 3 * b for b in range(sizes["B"])])


def padded(sizes: Sizes) -> np.ndarray:
    """Rows padded on the left, in the middle and on the right; the second row is all padding."""
    T = sizes["T"]
    ids = documents([T // 3, T - T // 3], sizes)
    ids[:, : T // 5] = ids[:, T // 2] = ids[:, T - T // 6 :] = -1
    ids[1:2] = -1
    return ids


def along(case: OpCase, inputs: Inputs, letter: str, where: Any) -> dict[str, Any]:
    """Every input that has an axis, indexed along it."""
    cut = dict(inputs)
    for name, x in inputs.items():
        axis = case.axis(name, letter)
        if axis is not None:
            cut[name] = x[(slice(None),) * axis + (where,)]
    return cut


def repeated(case: OpCase, inputs: Inputs, times: int) -> dict[str, np.ndarray]:
    """Inputs in which every shared key head is spelled out for each of its query heads."""
    return {
        name: x if (axis := case.axis(name, "K")) is None else np.repeat(x, times, axis)
        for name, x in inputs.items()
    }


def tokens(case: OpCase, result: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of a mapping by input name that have a token axis, as `[B,T,...]`."""
    return {name: x for name, x in result.items() if case.axis(name, "T") == 1}
