"""Times an op's implementations and the installed peers side by side, in one process.

    python -m experiments.benchmark --gin_file=benchmark/linear_attention.gin

Each result is first compared with the definition; a wrong one is reported and not timed.
"""

import dataclasses
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from experiments import cli, reporting
from experiments.benchmarks.base import Implementation, Inputs, OpBenchmark
from experiments.benchmarks.measure import (
    Program,
    Rates,
    TimingConfig,
    compile_program,
    interleaved,
    measure_rates,
    relative_error,
)
from experiments.figures import Figure, Panel, Series
from experiments.reporting import Report, Table, show, show_bytes

PASSES = ("forward", "forward+backward")

# Largest relative error (root mean square) that counts as correct.
_TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 3e-2, "float16": 5e-3}


def benchmark(
    *,
    operation: OpBenchmark,
    lengths: tuple[int, ...],
    passes: tuple[str, ...] = PASSES,
    check_up_to: int = 2048,
    timing: TimingConfig = TimingConfig(),  # noqa: B008  frozen
    run_dir: Path,
) -> None:
    """Times an op's implementations against one another and against the machine's floor.

    Args:
      operation: the op, its sizes, and what to compare.
      lengths: values of T, ascending.
      passes: which of "forward" and "forward+backward".
      check_up_to: longest T at which results are compared with the definition, whose memory is
        quadratic in T. Beyond it rows say so.
      timing: how to measure.
      run_dir: receives `results.json`, `report.md` and figures.
    """
    if not lengths or list(lengths) != sorted(set(lengths)) or lengths[0] < 1:
        raise ValueError(f"benchmark.lengths: expected ascending positive lengths, got {lengths}")
    if not passes or not set(passes) <= set(PASSES):
        raise ValueError(f"benchmark.passes: expected some of {PASSES}, got {passes}")
    results = measure(operation, lengths, passes, check_up_to, timing)
    reporting.write_results(run_dir, results)
    page = report(results)
    page.save(run_dir)
    page.print()
    print(f"\nreport: {run_dir / reporting.REPORT}")


def measure(
    operation: OpBenchmark,
    lengths: tuple[int, ...],
    passes: tuple[str, ...],
    check_up_to: int,
    timing: TimingConfig,
) -> dict[str, Any]:
    """Runs the measurements and returns what `results.json` holds."""
    environment = reporting.environment()
    rates = measure_rates(operation.dtype, timing)
    rows = []
    with Console(stderr=True).status("") as status:
        for length, kind in itertools.product(lengths, passes):
            status.update(f"{operation.op}, T={length}, {kind}")
            rows += _measure_point(operation, length, kind, length <= check_up_to, timing, rates)
    return {
        "script": "benchmark",
        "op": operation.op,
        "environment": environment,
        "operation": operation.to_dict(),
        "baselines": operation.baselines,
        "check_up_to": check_up_to,
        "tolerance": _TOLERANCE[operation.dtype],
        "rates": dataclasses.asdict(rates),
        "rows": rows,
    }


def _measure_point(
    operation: OpBenchmark, length: int, kind: str, check: bool, timing: TimingConfig, rates: Rates
) -> list[dict[str, Any]]:
    """One row for each implementation, at one length and pass."""
    inputs = operation.inputs(length)
    backward = kind == "forward+backward"
    cotangent = _cotangent(operation, inputs) if backward else None
    rows, programs = {}, {}
    common = _expected(operation, None, inputs, cotangent) if check else None
    for name, implementation in operation.implementations().items():
        if implementation.max_length is not None and length > implementation.max_length:
            continue
        rows[name] = {"implementation": name, "length": length, "pass": kind}
        expected = common
        if check and implementation.reference is not None:
            expected = _expected(operation, implementation.reference, inputs, cotangent)
        program, outcome = _try(implementation, inputs, cotangent, expected, operation.dtype)
        rows[name] |= outcome
        if program is not None:
            programs[name] = program
    cost = operation.cost(length, backward=backward)
    floor_ms = rates.floor_ms(*cost)
    for name, samples in interleaved(programs, timing).items():
        rows[name] |= _figures(programs[name], samples, cost, floor_ms, timing)
    return list(rows.values())


def _try(
    implementation: Implementation,
    inputs: Inputs,
    cotangent: jax.Array | None,
    expected: Mapping[str, jax.Array] | None,
    dtype: str,
) -> tuple[Program | None, dict[str, Any]]:
    """The program if it runs and is right, and what the row says about it."""
    try:
        program = compile_program(implementation, inputs, cotangent)
        got = program.run()
    # Whatever a peer raises on a shape it cannot serve belongs in its row, not on the screen.
    except Exception as error:
        return None, {"status": f"failed: {_first_line(error)}"}
    if expected is None:
        return program, {"status": "unchecked"}
    errors = {name: relative_error(got[name], expected[name]) for name in expected}
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    if not errors[worst] <= _TOLERANCE[dtype]:
        finite = errors[worst] if math.isfinite(errors[worst]) else None
        return None, {"status": f"WRONG ({worst})", "error": finite}
    return program, {"status": "ok", "error": errors[worst]}


def _figures(
    program: Program, samples: list[float], cost: Any, floor_ms: float, timing: TimingConfig
) -> dict[str, Any]:
    median = statistics.median(samples)
    device_ms = program.device_ms(timing.repetitions)
    best = device_ms or median
    return {
        "ms": {"median": median, "min": min(samples), "max": max(samples), "samples": len(samples)},
        "device_ms": device_ms,
        "temp_bytes": program.temp_bytes,
        "tflops": cost.flops / best / 1e9,
        "gbps": cost.bytes / best / 1e6,
        "floor_share": floor_ms / best,
    }


def _expected(
    operation: OpBenchmark,
    reference: Callable[..., Any] | None,
    inputs: Inputs,
    cotangent: jax.Array | None,
) -> dict[str, jax.Array]:
    """Output and gradients of the definition, in float32 at full precision."""
    definition = Implementation(reference or (lambda **arrays: operation.reference(arrays)))
    exact = {name: array.astype(jnp.float32) for name, array in inputs.items()}
    pulled = None if cotangent is None else cotangent.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        return compile_program(definition, exact, pulled).run()


def _cotangent(operation: OpBenchmark, inputs: Inputs) -> jax.Array:
    out = jax.eval_shape(operation.reference, inputs)
    return jax.random.normal(jax.random.key(operation.seed + 1), out.shape, operation.dtype)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120]}" if text else type(error).__name__


def report(results: Mapping[str, Any]) -> Report:
    """The report of a benchmark, from its recorded results alone."""
    rates, rows = results["rates"], results["rows"]
    sizes = ", ".join(
        f"{k} {v}" for k, v in results["operation"].items() if k != "__config__" and v is not None
    )
    blocks: list[str | Table | Figure] = [
        reporting.describe_environment(results["environment"]),
        f"Sizes: {sizes}. The machine's own rates in this run: matrix product "
        f"{rates['matrix'] / 1e12:.3g} TFLOP/s, copy {rates['copy'] / 1e9:.3g} GB/s. The floor is "
        "the larger of FLOPs over the one and bytes over the other, for the cheapest known form; "
        "arrays that stay in a cache can beat it. "
        f"Errors are relative to the definition in float32, checked up to T = "
        f"{results['check_up_to']}; "
        f"beyond {results['tolerance']:g} a result is WRONG and not timed.",
    ]
    for kind in dict.fromkeys(row["pass"] for row in rows):
        blocks.append(_times_table(_title(results), kind, [r for r in rows if r["pass"] == kind]))
    blocks += comparisons(results)
    return Report(title=f"Benchmark of {_title(results)}", blocks=[*blocks, *_plots(rows)])


def _title(results: Mapping[str, Any]) -> str:
    """The op, with its feature map if it has several."""
    feature_map = results["operation"].get("feature_map")
    return results["op"] + (f", {feature_map}" if feature_map else "")


def comparisons(results: Mapping[str, Any]) -> list[Table]:
    """How implementations compare with the baselines, and where one overtakes another."""
    rows, baselines = results["rows"], results.get("baselines", ())
    tables = [beside(rows, baselines)] if baselines else []
    if crossovers := list(_crossovers(rows, baselines)):
        header = ("pass", "from about T", "is faster", "than")
        tables.append(Table(title=f"{_title(results)}: crossovers", header=header, rows=crossovers))
    return tables


def longest(results: Mapping[str, Any]) -> list[list[Any]]:
    """A row for each implementation and pass, at the longest T that it was timed at."""
    last: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in results["rows"]:
        if "ms" in row:
            last[row["implementation"], row["pass"]] = row
    return [
        [
            _title(results), name, kind, row["length"], row["device_ms"] or row["ms"]["median"],
            f"{100 * row['floor_share']:.0f} %", show_bytes(row["temp_bytes"] or 0),
        ]
        for (name, kind), row in last.items()
    ]  # fmt: skip


def _times_table(op: str, kind: str, rows: list[dict[str, Any]]) -> Table:
    growth = _growth(rows)
    header = (
        "implementation", "T", "ms", "min–max", "on device", "×/doubling",
        "TFLOP/s", "GB/s", "of floor", "extra memory", "error", "status",
    )  # fmt: skip
    return Table(
        title=f"{op}, {kind}",
        header=header,
        rows=[_cells(row, growth) for row in sorted(rows, key=lambda r: r["length"])],
    )


def _cells(row: Mapping[str, Any], growth: Mapping[tuple[str, int], float]) -> list[Any]:
    name, length = row["implementation"], row["length"]
    if "ms" not in row:
        return [name, length, *[None] * 8, row.get("error"), row["status"]]
    ms, temporary = row["ms"], row["temp_bytes"]
    return [
        name, length, ms["median"], f"{show(ms['min'])}–{show(ms['max'])}", row["device_ms"],
        growth.get((name, length)), row["tflops"] or None, row["gbps"],
        f"{100 * row['floor_share']:.3g} %",
        None if temporary is None else show_bytes(temporary), row.get("error"), row["status"],
    ]  # fmt: skip


def _curves(rows: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Time against length, of each implementation that was timed."""
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        if (time := _time(row)) is not None:
            curves.setdefault(row["implementation"], {})[row["length"]] = time
    return curves


def _growth(rows: list[dict[str, Any]]) -> dict[tuple[str, int], float]:
    """By how much the time grew since the length before, per doubling of T."""
    return {
        (name, long): (times[long] / times[short]) ** (math.log(2) / math.log(long / short))
        for name, times in _curves(rows).items()
        for short, long in itertools.pairwise(sorted(times))
    }


def beside(rows: list[dict[str, Any]], baselines: Sequence[str]) -> Table:
    """Time and memory as shares of each baseline's, at the longest T that all of them reach."""
    timed = {
        (row["implementation"], row["length"], row["pass"]): row for row in rows if "ms" in row
    }
    table = []
    for kind in dict.fromkeys(row["pass"] for row in rows):
        reached = [{T for name, T, k in timed if (name, k) == (b, kind)} for b in baselines]
        length = max(set.intersection(*reached), default=None)
        for name in dict.fromkeys(row["implementation"] for row in rows):
            if (row := timed.get((name, length, kind))) is None:
                continue
            cells = [name, kind, length]
            for baseline in baselines:
                for figure in (_time, _memory):
                    ours, theirs = figure(row), figure(timed[baseline, length, kind])
                    cells.append(ours / theirs if ours and theirs else None)
            table.append(cells)
    header = ["implementation", "pass", "T"]
    header += [f"{what} / {name}" for name in baselines for what in ("time", "memory")]
    return Table(title="Shares of the baselines", header=header, rows=table)


def _crossovers(
    rows: list[dict[str, Any]], baselines: Sequence[str] = ()
) -> Iterator[tuple[str, int, str, str]]:
    """Where one implementation overtakes another for good, interpolated on logarithmic axes.

    A lead of less than a tenth at the longest T is noise, not a lead. With baselines, only where
    the first of them is overtaken; from the shortest T, if never behind.
    """
    for kind in dict.fromkeys(row["pass"] for row in rows):
        curves = _curves([row for row in rows if row["pass"] == kind])
        for slow, fast in itertools.permutations(curves, 2):
            if baselines and slow != baselines[0]:
                continue
            shared = sorted(set(curves[slow]) & set(curves[fast]))
            lag = {T: math.log(curves[fast][T] / curves[slow][T]) for T in shared}
            behind = [T for T in shared if lag[T] > 0]
            if not shared or lag[shared[-1]] >= -math.log(1.1):
                continue
            if baselines and not behind:
                yield kind, shared[0], fast, slow
            if behind:
                before = behind[-1]
                after = shared[shared.index(before) + 1]
                part = lag[before] / (lag[before] - lag[after])
                yield kind, round(before * (after / before) ** part), fast, slow


def _plots(rows: list[dict[str, Any]]) -> Iterator[Figure]:
    for name, ylabel, caption, value in (
        ("time", "time (ms)", "Time of one call against length.", _time),
        ("memory", "memory beside inputs and outputs (MiB)", "Memory against length.", _memory),
    ):
        panels = [
            Panel(
                title=kind,
                xlabel="length T (tokens)",
                ylabel=ylabel,
                series=_series([row for row in rows if row["pass"] == kind], value),
                xscale="log2",
                yscale="log",
            )
            for kind in dict.fromkeys(row["pass"] for row in rows)
        ]
        if any(panel.series for panel in panels):
            yield Figure(name=name, caption=caption, panels=panels)


def _series(
    rows: list[dict[str, Any]], value: Callable[[Mapping[str, Any]], float | None]
) -> list[Series]:
    """A curve for each implementation that has values."""
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if y := value(row):
            points.setdefault(row["implementation"], []).append((row["length"], y))
    return [
        Series(label=label, x=[x for x, _ in xy], y=[y for _, y in xy])
        for label, xy in points.items()
    ]


def _time(row: Mapping[str, Any]) -> float | None:
    return (row["device_ms"] or row["ms"]["median"]) if "ms" in row else None


def _memory(row: Mapping[str, Any]) -> float | None:
    return (row.get("temp_bytes") or 0) / 2**20 or None


if __name__ == "__main__":
    sys.exit(cli.main(benchmark))
