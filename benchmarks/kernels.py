"""What the scripts that time our kernels share: checks, clocks, and the record."""

import argparse
import dataclasses
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from benchmarks.compiling import UNTUNED, Workers
from pallas_kernels import source

MATRIX_RATE = 800e12  # bf16 FLOP/s and bytes/s measured on the device (benchmarks/h200)
BANDWIDTH = 4.3e12
# Of exp2 and log2: 16 a clock on each of 132 multiprocessors at 1.98 GHz.
TRANSCENDENTAL_RATE = 4.2e12


class Case(Protocol):
    """One shape and its competitors; a dataclass."""

    @property
    def name(self) -> str:
        """As the table spells it."""
        ...

    @property
    def reference_heads(self) -> int | None:
        """Heads that are compared with the reference, or None for all."""
        ...

    def inputs(self, seed: int) -> tuple[jax.Array, ...]:
        """q, k, v, log decays if there are any, and the gradient of the output."""
        ...

    def forms(self) -> Mapping[str, Callable]:
        """Functions of all inputs but the gradient, to time; "mosaic_gpu" is ours."""
        ...

    @property
    def reference(self) -> Callable[..., Any]:
        """The op's XLA form."""
        ...

    def floor(self, *, backward: bool) -> float:
        """Seconds that no implementation can undercut."""
        ...


def gradients(f: Callable) -> Callable:
    """Output and gradients, as one function of the inputs and the output's gradient g."""

    def run(*arrays_and_g):
        *arrays, g = arrays_and_g
        out, pull = jax.vjp(f, *arrays)
        return out, *pull(g)

    return run


def compile_for(case: Case, form: str, *, backward: bool) -> Any:
    """A form of a case, or its gradients, compiled."""
    arrays = jax.eval_shape(lambda: case.inputs(0))
    f = case.forms()[form]
    run, given = (gradients(f), arrays) if backward else (f, arrays[:-1])
    return jax.jit(run).lower(*given).compile()


def inputs_program(case: Case) -> Any:
    """The inputs of a seed."""
    return jax.jit(case.inputs).lower(0).compile()


def reference_program(case: Case) -> Any:
    """Output and gradients in float64, of the heads that are compared; called where x64 is on."""

    def run(*arrays):
        wide = (x[:, :, : case.reference_heads].astype(jnp.float64) for x in arrays)
        return gradients(case.reference)(*wide)

    arrays = jax.eval_shape(lambda: case.inputs(0))
    with jax.enable_x64(True):
        return jax.jit(run).lower(*arrays).compile(UNTUNED)


@dataclasses.dataclass(frozen=True)
class Programs:
    """What a case runs, compiled or about to be.

    Attributes:
      case: the case.
      forms: of each, by name, the form, or that with gradients.
      inputs, reference: as `inputs_program` and `reference_program` give them.
    """

    case: Case
    forms: Mapping[tuple[str, bool], Future]
    inputs: Future
    reference: Future


def compile_cases(cases: Sequence[Case], checks: Sequence[Case]) -> list[Programs]:
    """All that `measure` runs of cases, and `errors` of the cases that are only checked."""
    wanted = [
        (case, [(name, backward) for name in case.forms() for backward in (False, True)])
        for case in cases
    ] + [(case, [("mosaic_gpu", True)]) for case in checks]
    with Workers() as workers:
        forms = [
            {(name, b): workers.compile(compile_for, case, name, backward=b) for name, b in keys}
            for case, keys in wanted
        ]
        return [
            Programs(
                case, of_case, workers.run(inputs_program, case),
                workers.run(reference_program, case),
            )
            for (case, _), of_case in zip(wanted, forms, strict=True)
        ]  # fmt: skip


def errors(programs: Programs) -> dict[str, float]:
    """Relative RMS error of the output and every gradient, on fresh random inputs."""
    arrays = programs.inputs.result()(time.time_ns() % 2**30)
    poison()
    heads = slice(programs.case.reference_heads)
    got = [
        np.asarray(x)[:, :, heads].astype(np.float64)
        for x in programs.forms["mosaic_gpu", True].result()(*arrays)
    ]
    with jax.enable_x64(True):
        want = [np.asarray(x) for x in programs.reference.result()(*arrays)]
    names = ("out", "dq", "dk", "dv", "dg")[: len(got)]
    return {
        name: float(np.linalg.norm(a - b) / np.linalg.norm(b))
        for name, a, b in zip(names, got, want, strict=True)
    }


def poison() -> None:
    """Fills a gigabyte of the memory that outputs are allocated from with NaN."""
    jnp.full((2**28,), jnp.nan, jnp.float32).block_until_ready().delete()


def changes(first: Any, run: Callable[[], Any], names: Sequence[str], calls: int) -> dict[str, int]:
    """In how many of so many calls outputs differ from those of a first one, in any number.

    What goes wrong now and then, by less than an error shows, shows here.
    """
    arrays = jax.tree.leaves(first)
    counts = np.sum([_differ(arrays, jax.tree.leaves(run())) for _ in range(calls)], axis=0)
    return {name: int(count) for name, count in zip(names, counts, strict=True) if count}


@jax.jit
def _differ(first: list[jax.Array], second: list[jax.Array]) -> jax.Array:
    return jnp.stack([(a != b).any() for a, b in zip(first, second, strict=True)])


def times(compiled, *arrays, quick: bool = False) -> dict:
    """Milliseconds: the longest kernels of a call, all of them, the call; and its megabytes.

    `quick`: of few calls, as for those that take long.
    """
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arrays))
    slow = quick or time.perf_counter() - start > 0.1
    runs = _profile(compiled, arrays, calls=2 if slow else 9)
    longest: dict[str, list[float]] = {}
    for run in runs:
        for name, ms in run:
            longest.setdefault(name[:60], []).append(ms)
    kernels = [{"name": name, "ms": sum(all_ms) / len(runs)} for name, all_ms in longest.items()]
    kernels.sort(key=lambda kernel: -kernel["ms"])
    calls = []
    for _ in range(3 if slow else 30):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        calls.append(1e3 * (time.perf_counter() - start))
    total = float(np.median([sum(ms for _, ms in run) for run in runs]))
    return {
        "kernels": kernels[:16], "kernel_ms": total,
        "call_ms": float(np.median(calls)),
        "extra_megabytes": compiled.memory_analysis().temp_size_in_bytes / 1e6,
    }  # fmt: skip


def _profile(compiled, arrays, *, calls: int) -> list[list[tuple[str, float]]]:
    """Name and milliseconds of every kernel of each call.

    Calls are all in flight together, and XLA may run kernels of two of them that do not wait for
    each other in another order than before. The profiler cannot tell such calls apart, and raises;
    then each is measured by itself.
    """
    try:
        _, runs = profiler.measure(compiled, aggregate=False, iterations=calls)(*arrays)
    except RuntimeError as error:
        if "not consistent across iterations" not in str(error):
            raise
        one = profiler.measure(compiled, aggregate=False)
        runs = [one(*arrays)[1] or [] for _ in range(calls)]
    assert runs, "the profiler saw no kernel"
    return runs


def check(programs: Programs) -> dict:
    """A row of the record without times."""
    case = programs.case
    row = {"case": case.name, **dataclasses.asdict(case)}  # pyrefly: ignore
    return row | {"errors": errors(programs)}


def measure(programs: Programs) -> dict:
    """A row of the record, with times of each form, forward and with its gradients."""
    row: dict[str, Any] = check(programs)
    arrays = programs.inputs.result()(0)
    for (name, backward), program in programs.forms.items():
        kind = "forward_backward" if backward else "forward"
        timed = times(program.result(), *(arrays if backward else arrays[:-1]))
        if name == "mosaic_gpu":
            floor = 1e3 * programs.case.floor(backward=backward)
            timed |= {"floor_ms": floor, "floor_share": floor / timed["kernel_ms"]}
        row.setdefault(name, {})[kind] = timed
    return row


def summary(row: dict) -> str:
    """One line: errors, then kernel (call) milliseconds and share of the floor."""
    parts = [row["case"], " ".join(f"{k} {v:.1e}" for k, v in row["errors"].items())]
    for name, form in row.items():
        if isinstance(form, dict) and "forward" in form:
            for key in ("forward", "forward_backward"):
                t = form[key]
                share = f" {t['floor_share']:.0%}" if "floor_share" in t else ""
                parts.append(f"{name} {key} {t['kernel_ms']:.3f} ({t['call_ms']:.3f}) ms{share}")
    return " | ".join(parts)


def save(path: Path | None, module: str, **fields: Any) -> None:
    """Writes a record, with where it comes from and of which kernels, if there is a path."""
    if path is None:
        return
    record = {
        "device": jax.devices()[0].device_kind, "jax": jax.__version__,
        "command": f"python -m benchmarks.{module} " + shlex.join(sys.argv[1:]),
        "digests": source.digests("mosaic_gpu"), **fields,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def main(module: str, description: str, cases: Sequence[Case], checks: Sequence[Case] = ()) -> None:
    """Measures cases, checks others, and writes the record."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="JSON file, written anew after every case")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no case after that")
    parser.add_argument("--only", nargs="+", help="cases in whose names one of these stands")
    arguments = parser.parse_args()
    start = time.perf_counter()
    if arguments.only is not None:
        cases, checks = (
            [case for case in these if any(part in case.name for part in arguments.only)]
            for these in (cases, checks)
        )
    compiled = compile_cases(cases, checks)
    print(f"compiled after {time.perf_counter() - start:.0f} s", flush=True)
    record: dict[str, list] = {"rows": [], "checks": [], "failed": []}
    todo = [("rows", measure)] * len(cases) + [("checks", check)] * len(checks)
    for (kind, run), programs in zip(todo, compiled, strict=True):
        if time.perf_counter() - start > arguments.seconds:
            break
        try:
            record[kind].append(run(programs))
            print(summary(record[kind][-1]), flush=True)
        except Exception as error:  # the others are worth having
            record["failed"].append({"case": programs.case.name, "error": repr(error)[:1000]})
            print(record["failed"][-1], flush=True)
        save(arguments.out, module, **record)
