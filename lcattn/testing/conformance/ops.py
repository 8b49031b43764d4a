"""The list of checks of an op."""

import functools
from collections.abc import Callable, Iterator

from lcattn.testing.conformance import order, transforms, values
from lcattn.testing.conformance.cases import OpCase, spell


def op_checks(case: OpCase) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every check that a case's declaration calls for, as (id, function without arguments).

    A function raises an AssertionError that says what differs, where and by how much.
    """
    for implementation in case.implementations:
        checks = [*_semantics(case)]
        if not case.is_variant:
            checks += _numerics(case)
            if implementation == case.implementations[-1]:
                checks += _sizes(case)
                checks += _transforms(case)
        for name, check, sizes, *options in checks:
            run = functools.partial(check, case, implementation, sizes, **dict(*options))
            yield f"{case.name}/{implementation or 'auto'}/{name}/{spell(sizes)}", run


def _semantics(case: OpCase) -> Iterator[tuple]:
    C = case.chunk
    for length in (1, C + 1) if case.is_variant else (1, C - 1, C, C + 1):
        yield "values", values.check_values, case.sizes_at(length)
    ragged = case.sizes_at(2 * C + 1)
    yield "gradients", values.check_gradients, ragged
    yield "gradients-packed", values.check_gradients, ragged, {"packed": True}
    if case.is_causal:
        yield "causality", order.check_causality, ragged
    yield "packing", order.check_packing, ragged, {"lengths": [1, C + 1, C - 1]}
    yield "padding", order.check_padding, ragged
    if case.bidirectional:
        both = {"causal": False}
        packed = {"causal": False, "packed": True}
        if not case.is_variant:
            yield "gradients-bidirectional", values.check_gradients, ragged, both
        yield "gradients-bidirectional-packed", values.check_gradients, ragged, packed
        yield "padding-bidirectional", order.check_padding, ragged, both
    if case.stateful:
        yield "state-packed", order.check_state, ragged, {"packed": True}


def _numerics(case: OpCase) -> Iterator[tuple]:
    ragged = case.sizes_at(2 * case.chunk + 1)
    yield "bfloat16", values.check_low_precision, ragged, {"dtype": "bfloat16"}
    yield "extremes", values.check_extremes, ragged


def _sizes(case: OpCase) -> Iterator[tuple]:
    for length, size in ((63, 32), (127, 64), (1000, 128)):
        sizes = case.sizes_at(length, B=1, N=2, K=1, H=size, D=size)
        # The gradients of short ragged lengths are compared above, to the last digits.
        yield "sizes", values.check_sizes, sizes, {"gradients": length == 1000}
    ragged = case.sizes_at(2 * case.chunk + 1)
    yield "empty-batch", values.check_empty, case.sizes_at(2 * case.chunk + 1, B=0)
    yield "float16", values.check_low_precision, ragged, {"dtype": "float16"}
    if "K" in ragged:
        yield "grouped-queries", values.check_grouped_queries, ragged
    if case.stateful:
        yield "state", order.check_state, ragged


def _transforms(case: OpCase) -> Iterator[tuple]:
    ragged = case.sizes_at(2 * case.chunk + 1)
    yield "eager", transforms.check_eager, ragged
    yield "compiled-once", transforms.check_compiled_once, ragged
    yield "vmap-checkpoint-scan", transforms.check_mapped, ragged
    yield "shard_map", transforms.check_sharded, ragged
    yield "explicit-axes", transforms.check_explicit, ragged
    yield "x64", transforms.check_x64, ragged
