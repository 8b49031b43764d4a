"""Finds the fastest launch parameters of our kernels on one GPU, and writes the tables they read.

    python -m benchmarks.tune linear_attention --out pallas_kernels/tables

Of every shape, launch parameters are varied one at a time; then the best of each are taken
together. The measure is the sum of the kernels of one forward and backward call (CUPTI, median of
9, or 2 of slow calls). Gains under 2 % are noise: the kernel's formula stays. All programs but
those last ones are compiled before the first is timed. The table is written anew after every shape,
and entries of other shapes are kept.
"""

import argparse
import dataclasses
import functools
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax

from benchmarks import kernels
from benchmarks.compiling import Workers
from benchmarks.gated_linear_attention_kernel import Case as Gated
from benchmarks.linear_attention_kernel import IDENTITY, TAYLOR
from benchmarks.linear_attention_kernel import Case as Linear
from benchmarks.softplus_attention_kernel import Case as Softplus
from pallas_kernels import tuned
from pallas_kernels.gated_linear_attention import config as gated
from pallas_kernels.linear_attention import config as linear
from pallas_kernels.softplus_attention import config as softplus

_LEAST_GAIN = 0.02
_WIDE: dict[str, Any] = {"N": 16, "K": 16, "H": 128}


@dataclasses.dataclass(frozen=True)
class Search:
    """What is tried.

    Attributes:
      cases: the shapes, and numbers of groups for each if the kernel takes groups.
      choices: values of other launch parameters.
      formula: the kernel's heuristic, of a case.
    """

    cases: Sequence[tuple[Any, Sequence[int]]]
    choices: Mapping[str, Sequence[Any]]
    formula: Callable[[Any], Any]

    def candidates(self, formula: Any, groups: Sequence[int]) -> list[dict[str, Any]]:
        """The formula, and what differs from it in one launch parameter."""
        choices = {"groups": groups, **self.choices}
        return [{}] + [
            {name: value}
            for name, values in choices.items() for value in values
            if value != getattr(formula, name)
        ]  # fmt: skip


_SHAPES: list[tuple[dict[str, Any], Sequence[int]]] = [
    ({"B": 1, "T": 32768}, (4, 8, 16, 32)), ({"B": 16, "T": 2048}, (1, 2)),
    ({"B": 1, "T": 2048}, (4, 8, 16, 32)), ({"B": 4, "T": 8192}, (1, 2, 4, 8)),
]  # fmt: skip
SEARCHES = {
    "linear_attention": Search(
        [(Linear(**kind, **shape), groups)
         for shape, groups in _SHAPES for kind in (TAYLOR, IDENTITY)],
        {"stages": (2, 3), "gradient_stages": (2, 3)},
        lambda case: linear.heuristic(B=case.B, T=case.T, N=case.N, F=case.F, H=case.H),
    ),
    "gated_linear_attention": Search(
        [(Gated(**shape), groups) for shape, groups in _SHAPES], {"stages": (2, 3)},
        lambda case: gated.heuristic(B=case.B, T=case.T, N=case.N, F=case.F, H=case.H),
    ),
    "softplus_attention": Search(
        [(Softplus(B=1, T=8192, **_WIDE), ()), (Softplus(B=1, T=8192, **(_WIDE | {"H": 64})), ())],
        {
            "width": (64, 128), "stages": (2, 3, 4), "gradient_width": (64, 128),
            "gradient_stages": (2, 3),
        },
        lambda case: softplus.heuristic(B=case.B, T=case.T, N=case.N, H=case.H),
    ),
}  # fmt: skip


def compile_trial(kernel: str, case: Any, fields: tuned.Fields) -> Any:
    """Forward and backward with some launch parameters."""
    with tuned.trial(kernel, fields):
        return kernels.compile_for(case, "mosaic_gpu", backward=True)


@dataclasses.dataclass(frozen=True)
class Trials:
    """The programs of one shape.

    Attributes:
      case: the shape.
      sizes: what the kernel's table is asked for.
      programs: each candidate's launch parameters and program, the formula first.
    """

    case: Any
    sizes: Mapping[str, int]
    programs: Sequence[tuple[tuned.Fields, Future]]

    @classmethod
    def of(
        cls, kernel: str, case: Any, groups: Sequence[int], compile_: Callable[..., Future]
    ) -> "Trials":
        """All candidates, `compile_(compile_trial, ...)` of each."""
        found = SEARCHES[kernel]
        with tuned.trial(kernel, {}) as asked:
            formula = found.formula(case)
        programs = [
            (fields, compile_(compile_trial, kernel, case, fields))
            for fields in found.candidates(formula, groups)
        ]
        return cls(case, asked[0], programs)


def search(kernel: str, trials: Trials) -> dict[str, Any]:
    """The entry of one shape."""
    arrays = trials.case.inputs(seed=0)
    tried = []
    for fields, program in trials.programs:
        ms = _milliseconds(trials.case, fields, program.result, arrays)
        tried += [] if ms is None else [(fields, ms)]
    formula = tried[0][1]
    best: dict[str, Any] = {}
    for name in {name: None for fields, _ in tried for name in fields}:
        fields, ms = min((t for t in tried if name in t[0]), key=lambda t: t[1])
        best |= fields if ms < (1 - _LEAST_GAIN) * formula else {}
    if len(best) > 1:
        together = functools.partial(compile_trial, kernel, trials.case, best)
        ms = _milliseconds(trials.case, best, together, arrays)
        tried += [] if ms is None else [(best, ms)]
    fields, ms = min(tried, key=lambda t: t[1])
    if ms >= (1 - _LEAST_GAIN) * formula:
        fields, ms = {}, formula
    return {
        "case": trials.case.name, "sizes": trials.sizes, "config": fields, "ms": ms,
        "formula_ms": formula, "tried": [{"config": fields, "ms": ms} for fields, ms in tried],
    }  # fmt: skip


def _milliseconds(
    case: Any, fields: tuned.Fields, program: Callable[[], Any], arrays: Any
) -> float | None:
    """The time of a candidate, or None if its launch parameters do not suit the shape."""
    try:
        return kernels.times(program(), *arrays)["kernel_ms"]
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        print(f"{case.name} {fields}: {str(error)[:200]}", flush=True)
        return None


def main() -> None:
    """Searches all shapes of a kernel and writes its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernel", choices=SEARCHES)
    parser.add_argument("--out", type=Path, help="folder of the tables")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no shape after that")
    arguments = parser.parse_args()
    start, found = time.perf_counter(), {}
    with Workers(processes=16) as workers:
        shapes = [
            Trials.of(arguments.kernel, case, groups, workers.compile)
            for case, groups in SEARCHES[arguments.kernel].cases
        ]
    for trials in shapes:
        if time.perf_counter() - start > arguments.seconds:
            break
        entry = search(arguments.kernel, trials)
        found[tuned.rounded(entry["sizes"])] = entry
        print(json.dumps({k: v for k, v in entry.items() if k != "tried"}), flush=True)
        if arguments.out is not None:
            _write(arguments.out / f"{arguments.kernel}.json", found)


def _write(path: Path, found: Mapping[Any, dict[str, Any]]) -> None:
    """Writes the table: what was found now, and what an earlier run found of other shapes."""
    kept = json.loads(path.read_text())["entries"] if path.exists() else []
    kept = [entry for entry in kept if tuned.rounded(entry["sizes"]) not in found]
    table = {
        "device": jax.devices()[0].device_kind, "jax": jax.__version__,
        "command": "python -m benchmarks.tune " + shlex.join(sys.argv[1:]),
        "entries": [*kept, *found.values()],
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
