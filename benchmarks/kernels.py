"""What the scripts that time our kernels share: checks, clocks, and the record."""

import argparse
import dataclasses
import functools
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

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


def compile_for(case: Case, f: Callable, *, backward: bool):
    """`f`, or its gradients, compiled for a shape."""
    arrays = jax.eval_shape(lambda: case.inputs(0))
    return jax.jit(gradients(f)).lower(*arrays).compile() if backward else (
        jax.jit(f).lower(*arrays[:-1]).compile()
    )  # fmt: skip


def compile_all[Key](programs: Mapping[Key, Callable[[], Any]]) -> dict[Key, Any]:
    """Compiles side by side, all before anything is timed: XLA tries out products on the device."""
    with ThreadPoolExecutor() as pool:
        futures = {key: pool.submit(program) for key, program in programs.items()}
        return {key: future.result() for key, future in futures.items()}


def errors(case: Case, compiled) -> dict[str, float]:
    """Relative RMS error of the output and every gradient, on fresh random inputs."""
    arrays = case.inputs(seed=time.time_ns() % 2**31)
    poison()
    heads = slice(case.reference_heads)
    got = [np.asarray(x[:, :, heads], np.float64) for x in compiled(*arrays)]
    with jax.enable_x64(True):
        wide = [x[:, :, heads].astype(jnp.float64) for x in arrays]
        want = [np.asarray(x) for x in jax.jit(gradients(case.reference))(*wide)]
    names = ("out", "dq", "dk", "dv", "dg")[: len(got)]
    return {
        name: float(np.linalg.norm(a - b) / np.linalg.norm(b))
        for name, a, b in zip(names, got, want, strict=True)
    }


def poison() -> None:
    """Fills a gigabyte of the memory that outputs are allocated from with NaN."""
    jnp.full((2**28,), jnp.nan, jnp.float32).block_until_ready().delete()


def times(compiled, *arrays, quick: bool = False) -> dict:
    """Milliseconds: the longest kernels of a call, all of them, the call; and its megabytes.

    `quick`: of few calls, as for those that take long.
    """
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arrays))
    slow = quick or time.perf_counter() - start > 0.1
    _, runs = profiler.measure(compiled, aggregate=False, iterations=2 if slow else 9)(*arrays)
    longest: dict[str, list[float]] = {}
    assert runs, "the profiler saw no kernel"
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
        "kernels": kernels[:6], "kernel_ms": total,
        "call_ms": float(np.median(calls)),
        "extra_megabytes": compiled.memory_analysis().temp_size_in_bytes / 1e6,
    }  # fmt: skip


def measure(case: Case, programs: Mapping[tuple[str, bool], Any]) -> dict:
    """One row of the record, by the programs of each form, forward and with its gradients."""
    *arrays, g = case.inputs(seed=0)
    row: dict[str, Any] = {"case": case.name, **dataclasses.asdict(case)}  # pyrefly: ignore
    row["errors"] = errors(case, programs["mosaic_gpu", True])
    for name in case.forms():
        row[name] = {
            "forward": times(programs[name, False], *arrays),
            "forward_backward": times(programs[name, True], *arrays, g),
        }
    for key, backward in (("forward", False), ("forward_backward", True)):
        floor = 1e3 * case.floor(backward=backward)
        row["mosaic_gpu"][key]["floor_ms"] = floor
        row["mosaic_gpu"][key]["floor_share"] = floor / row["mosaic_gpu"][key]["kernel_ms"]
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


def main(module: str, description: str, cases: Sequence[Case]) -> None:
    """Measures every shape and writes the record."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="JSON file, written anew after every shape")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no shape after that")
    arguments = parser.parse_args()
    start, rows = time.perf_counter(), []
    compiled = compile_all({
        (case, name, backward): functools.partial(compile_for, case, f, backward=backward)
        for case in cases for name, f in case.forms().items() for backward in (False, True)
    })  # fmt: skip
    for case in cases:
        if time.perf_counter() - start > arguments.seconds:
            break
        programs = {key[1:]: program for key, program in compiled.items() if key[0] == case}
        rows.append(measure(case, programs))
        print(summary(rows[-1]), flush=True)
        save(arguments.out, module, rows=rows)
