"""Whether the kernels give the same bits in every call, on one Hopper GPU.

    python -m benchmarks.repeats --out benchmarks/h200/repeats.json

Output and gradients of the shapes of the kernels' benchmarks, computed again and again from the
same inputs. Where a kernel reads or overwrites something too early it may go wrong in one call of
ten or of thousands, and by less than an error against a definition shows.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import (
    block_sparse_attention_kernel,
    gated_linear_attention_kernel,
    kernels,
    linear_attention_kernel,
    neural_memory_kernel,
    softplus_attention_kernel,
)
from benchmarks.compiling import Workers

CALLS = 10, 100
"""At least and at most, after the first."""

SECONDS = 2.0
"""For the calls of a shape, if so few suffice."""


class Work(NamedTuple):
    """Shapes of one benchmark.

    Attributes:
      cases: the shapes, which have names.
      build: compiles output and gradients of one.
      inputs: what the compiled program takes.
      names: of what it returns, the first of them if it returns fewer.
    """

    cases: list[Any]
    build: Callable[[Any], Any]
    inputs: Callable[[Any], tuple[Any, ...]]
    names: Callable[[Any], list[str]]


def kernel_program(case: Any) -> Any:
    """Of the benchmarks whose cases are alike."""
    return kernels.compile_for(case, "mosaic_gpu", backward=True)


def block_sparse_program(case: Any) -> Any:
    """Of block-sparse attention."""
    return block_sparse_attention_kernel.program(case, "mosaic_gpu", backward=True)


def neural_memory_program(case: Any) -> Any:
    """Of the neural memory."""
    return case.program("mosaic_gpu", backward=True)


def block_sparse_inputs(case: Any) -> tuple[Any, ...]:
    """Of block-sparse attention, whose plan is one of them."""
    *arrays, g, g_lse = case.inputs(0)
    return *arrays, block_sparse_attention_kernel.plan_of(case), g, g_lse


def all_work() -> dict[str, Work]:
    """By kernel."""
    work = {
        name: Work(
            [*module.CASES, *getattr(module, "CHECKS", [])], kernel_program,
            lambda case: jax.jit(case.inputs)(0), lambda case: ["out", "dq", "dk", "dv", "dg"],
        )
        for name, module in (
            ("linear_attention", linear_attention_kernel),
            ("gated_linear_attention", gated_linear_attention_kernel),
            ("softplus_attention", softplus_attention_kernel),
        )
    }  # fmt: skip
    sparse = block_sparse_attention_kernel
    work["block_sparse_attention"] = Work(
        list(sparse.CASES.values()), block_sparse_program, block_sparse_inputs,
        lambda case: list(sparse.OUTPUTS),
    )  # fmt: skip
    work["neural_memory"] = Work(
        neural_memory_kernel.CASES, neural_memory_program, lambda case: case.inputs(0),
        lambda case: case.names,
    )  # fmt: skip
    return work


def row(name: str, case: Any, run: Any, arrays: tuple[Any, ...], names: list[str]) -> dict:
    """One row of the record: the outputs that calls changed, and how many calls did."""
    kernels.poison()
    jax.block_until_ready(run(*arrays))
    start = time.perf_counter()
    first = jax.block_until_ready(run(*arrays))
    least, most = CALLS
    calls = min(max(int(SECONDS / (time.perf_counter() - start)), least), most)
    names = names[: len(jax.tree.leaves(first))]
    changed = kernels.changes(first, lambda: run(*arrays), names, calls)
    return {"kernel": name, "case": case.name, "later_calls": calls, "changed": changed}


def rows(work: dict[str, Work]) -> Iterator[dict]:
    """Those of all shapes; what fails is a row too."""
    with Workers(12) as workers:
        programs = [
            (name, case, workers.compile(of.build, case))
            for name, of in work.items() for case in of.cases
        ]  # fmt: skip
    for name, case, program in programs:
        of = work[name]
        try:
            yield row(name, case, program.result(), of.inputs(case), of.names(case))
        except Exception as error:  # the others are worth having
            yield {"kernel": name, "case": case.name, "error": repr(error)[:1000]}


def main() -> None:
    """Runs every shape, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file, written anew after every shape")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start none after that")
    parser.add_argument("--only", nargs="+", help="kernels; default: all")
    arguments = parser.parse_args()
    start, done = time.perf_counter(), []
    work = all_work()
    for result in rows({name: work[name] for name in arguments.only or work}):
        done.append(result)
        kernels.save(arguments.out, "repeats", rows=done)
        outcome = result.get("error") or result["changed"] or "the same"
        print(result["kernel"], result["case"], result.get("later_calls"), outcome, flush=True)
        if time.perf_counter() - start > arguments.seconds:
            break


if __name__ == "__main__":
    main()
