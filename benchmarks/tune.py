"""Finds the fastest launch parameters of our kernels on one GPU, and writes the tables they read.

    python -m benchmarks.tune linear_attention --out pallas_kernels/tables

Of every shape, launch parameters are varied one at a time; then the best of each are taken
together. The measure is the sum of the kernels of one forward and backward call (CUPTI, median of
9, or 2 of slow calls). Gains under 2 % are noise: the kernel's formula stays. The table is written
anew after every shape, and entries of other shapes are kept.
"""

import argparse
import dataclasses
import functools
import json
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import kernels
from benchmarks.gated_linear_attention_kernel import Case as Gated
from benchmarks.linear_attention_kernel import IDENTITY, TAYLOR
from benchmarks.linear_attention_kernel import Case as Linear
from benchmarks.softplus_attention_kernel import Case as Softplus
from pallas_kernels import tuned

_LEAST_GAIN = 0.02
_WIDE: dict[str, Any] = {"N": 16, "K": 16, "H": 128}


@dataclasses.dataclass(frozen=True)
class Search:
    """What is tried.

    Attributes:
      cases: the shapes.
      choices: values of launch parameters; those that do not suit a shape are left out.
    """

    cases: Sequence[Any]
    choices: Mapping[str, Sequence[Any]]


_SHAPES: list[dict[str, Any]] = [
    {"B": 1, "T": 32768}, {"B": 16, "T": 2048}, {"B": 1, "T": 2048}, {"B": 4, "T": 8192},
]  # fmt: skip
SEARCHES = {
    "linear_attention": Search(
        [Linear(**kind, **shape) for shape in _SHAPES for kind in (TAYLOR, IDENTITY)],
        {"groups": (1, 2, 4, 8, 16, 32), "stages": (2, 3), "gradient_stages": (2, 3)},
    ),
    "gated_linear_attention": Search(
        [Gated(**shape) for shape in _SHAPES], {"groups": (1, 2, 4, 8, 16, 32), "stages": (2, 3)}
    ),
    "softplus_attention": Search(
        [Softplus(B=1, T=8192, **_WIDE), Softplus(B=1, T=8192, **(_WIDE | {"H": 64}))],
        {
            "width": (64, 128), "stages": (2, 3, 4), "gradient_width": (64, 128),
            "gradient_stages": (2, 3),
        },
    ),
}  # fmt: skip


def search(kernel: str, case: Any, choices: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The entry of one shape."""
    candidates: list[dict[str, Any]] = [{}]
    candidates += [{name: value} for name, values in choices.items() for value in values]
    programs = {i: functools.partial(_compile, kernel, case, x) for i, x in enumerate(candidates)}
    compiled = list(kernels.compile_all(programs).values())
    (_, asked) = next(pair for pair in compiled if pair[0] is not None)
    arrays = case.inputs(seed=0)
    tried = [
        (fields, kernels.times(program, *arrays)["kernel_ms"])
        for fields, (program, _) in zip(candidates, compiled, strict=True)
        if program is not None
    ]
    formula = tried[0][1]
    best: dict[str, Any] = {}
    for name in choices:
        varied = [trial for trial in tried if name in trial[0]]
        fields, ms = min(varied, key=lambda trial: trial[1], default=({}, math.inf))
        best |= fields if ms < (1 - _LEAST_GAIN) * formula else {}
    if len(best) > 1:
        program, _ = _compile(kernel, case, best)
        if program is not None:
            tried.append((best, kernels.times(program, *arrays)["kernel_ms"]))
    fields, ms = min(tried, key=lambda t: t[1])
    if ms >= (1 - _LEAST_GAIN) * formula:
        fields, ms = {}, formula
    return {
        "case": case.name, "sizes": asked[0], "config": fields, "ms": ms, "formula_ms": formula,
        "tried": [{"config": fields, "ms": ms} for fields, ms in tried],
    }  # fmt: skip


def _compile(kernel: str, case: Any, fields: tuned.Fields) -> tuple[Any, list[dict[str, int]]]:
    """Forward and backward with some launch parameters, None if they do not suit; sizes asked."""
    with tuned.trial(kernel, fields) as asked:
        try:
            return kernels.compile_for(case, case.ours, backward=True), asked
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            print(f"{case.name} {fields}: {str(error)[:200]}", flush=True)
            return None, asked


def main() -> None:
    """Searches all shapes of a kernel and writes its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernel", choices=SEARCHES)
    parser.add_argument("--out", type=Path, help="folder of the tables")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no shape after that")
    arguments = parser.parse_args()
    start, found = time.perf_counter(), {}
    for case in SEARCHES[arguments.kernel].cases:
        if time.perf_counter() - start > arguments.seconds:
            break
        entry = search(arguments.kernel, case, SEARCHES[arguments.kernel].choices)
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
