"""Times the linear-attention kernels against the XLA form on one GPU, and checks them first.

    python -m benchmarks.linear_attention_kernel --out benchmarks/h200/linear_attention_kernel.json

Every value and gradient is compared with the XLA form in float64 on fresh random inputs, after
filling the memory that outputs are allocated from with NaN. Times are the sum of the kernels of
one call (CUPTI, median of 9), and the wall time of a call with its host work (median of 30).
"""

import argparse
import dataclasses
import json
import math
import shlex
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from lcattn.ops import linear_attention
from pallas_kernels.linear_attention.config import LaunchConfig
from pallas_kernels.linear_attention.mosaic_gpu import linear_attention as kernel

MATRIX_RATE = 800e12  # bf16 FLOP/s and bytes/s measured on the device (benchmarks/h200)
BANDWIDTH = 4.3e12


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape; `groups` None is the heuristic's."""

    feature_map: str
    B: int
    T: int
    N: int
    K: int
    F: int
    H: int
    normalize: bool
    groups: int | None = None
    stages: int = 2

    @property
    def name(self) -> str:
        """As the table spells it."""
        split = "" if self.groups is None else f" groups={self.groups} stages={self.stages}"
        kind = "normalised" if self.normalize else "plain"
        return (
            f"{self.feature_map} {kind} B={self.B} T={self.T} N={self.N} K={self.K} F={self.F}"
            f" H={self.H}{split}"
        )

    def inputs(self, seed: int):
        """q, k, v and the gradient of the output."""
        keys = jax.random.split(jax.random.key(seed), 4)
        shapes = [(self.N, self.F), (self.K, self.F), (self.K, self.H), (self.N, self.H)]
        return tuple(
            jax.random.normal(key, (self.B, self.T, *shape), jnp.bfloat16)
            for key, shape in zip(keys, shapes, strict=True)
        )

    def ours(self, q, k, v):
        """The kernel."""
        config = (
            None if self.groups is None else LaunchConfig(groups=self.groups, stages=self.stages)
        )
        return kernel(
            q, k, v, feature_map=self.feature_map, scale=self.F**-0.5, normalize=self.normalize,
            config=config,
        )[0]  # fmt: skip

    def xla(self, q, k, v):
        """The op's XLA form."""
        return linear_attention(
            q, k, v, feature_map=self.feature_map, normalize=self.normalize, implementation="xla"
        )

    def floor(self, *, backward: bool) -> float:
        """Seconds: the larger of matrix work and traffic, each input and output moved once.

        Work counts what the chunked form needs with 64 tokens a chunk and D = 153 or F features.
        """
        D = 153 if self.feature_map == "taylor" else self.F
        F, H, C = self.F, self.H, 64
        flops = 4 * D * H + C * (F + H)  # causal half of the scores
        size = 2 * (self.N * (F + H) + self.K * (F + H))
        if backward:  # two sweeps, each recomputing what it needs, and q, k, v, g, dq, dk, dv
            flops += 4 * D * H + 2 * C * (F + F + H) / 2 + 6 * D * H + 2 * C * (2 * F + 2 * H) / 2
            size += 2 * (3 * self.N * (F + H) + 2 * self.K * (F + H))
        tokens = self.B * self.T
        return max(tokens * self.N * flops / MATRIX_RATE, tokens * size / BANDWIDTH)


def gradients(f):
    """Output and gradients, as one function of (q, k, v, g)."""

    def run(q, k, v, g):
        out, pull = jax.vjp(f, q, k, v)
        return out, *pull(g)

    return run


def compile_for(case: Case, f):
    """`f` of (q, k, v), or what `gradients` made of it, compiled for a shape."""
    q, k, v, g = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in case.inputs(0))
    arguments = (q, k, v, g) if f.__name__ == "run" else (q, k, v)
    return jax.jit(f).lower(*arguments).compile()


def errors(case: Case, compiled) -> dict[str, float]:
    """Relative RMS error of the output and every gradient."""
    q, k, v, g = case.inputs(seed=time.time_ns() % 2**31)
    poison = jnp.full((2**28,), jnp.nan, jnp.float32).block_until_ready()
    poison.delete()
    got = [np.asarray(x, np.float64) for x in compiled(q, k, v, g)]
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in (q, k, v, g)]
        want = [np.asarray(x) for x in jax.jit(gradients(case.xla))(*wide)]
    names = ("out", "dq", "dk", "dv")
    return {
        name: float(np.linalg.norm(a - b) / np.linalg.norm(b))
        for name, a, b in zip(names, got, want, strict=True)
    }


def times(compiled, *arrays) -> dict:
    """Milliseconds: kernels of one call, the sum of them, and the call itself."""
    _, runs = profiler.measure(compiled, aggregate=False, iterations=9)(*arrays)
    kernels = [
        {"name": name[:60], "ms": float(np.median([run[i][1] for run in runs]))}
        for i, (name, _) in enumerate(runs[0])
    ]
    calls = []
    for _ in range(30):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        calls.append(1e3 * (time.perf_counter() - start))
    total = float(np.median([sum(ms for _, ms in run) for run in runs]))
    loops = len(kernels) > 20  # XLA's loops launch a kernel a step: their sum says enough
    return {
        "kernels": [] if loops else kernels, "kernel_ms": total,
        "call_ms": float(np.median(calls)),
    }  # fmt: skip


def measure(case: Case) -> dict:
    """One row of the record."""
    q, k, v, g = case.inputs(seed=0)
    row = {"case": case.name, **dataclasses.asdict(case)}
    for name, f in (("mosaic_gpu", case.ours), ("xla", case.xla)):
        both = compile_for(case, gradients(f))
        if name == "mosaic_gpu":
            row["errors"] = errors(case, both)
        row[name] = {
            "forward": times(compile_for(case, f), q, k, v),
            "forward_backward": times(both, q, k, v, g),
        }
    for key, backward in (("forward", False), ("forward_backward", True)):
        floor = 1e3 * case.floor(backward=backward)
        row["mosaic_gpu"][key]["floor_ms"] = floor
        row["mosaic_gpu"][key]["floor_share"] = floor / row["mosaic_gpu"][key]["kernel_ms"]
    return row


TAYLOR = {"feature_map": "taylor", "N": 16, "K": 16, "F": 16, "H": 64, "normalize": True}
IDENTITY = {"feature_map": "identity", "N": 16, "K": 16, "F": 128, "H": 128, "normalize": False}
CASES = [
    Case(B=1, T=32768, **TAYLOR),
    Case(B=16, T=2048, **TAYLOR),
    Case(B=1, T=32768, **IDENTITY),
    Case(B=1, T=1024, **TAYLOR),
    Case(B=1, T=1000, **{**TAYLOR, "K": 4, "H": 128}),
    Case(B=4, T=8192, **TAYLOR),
    Case(B=1, T=32768, **{**TAYLOR, "normalize": False}),
    Case(B=1, T=131072, **TAYLOR),
]


def main() -> None:
    """Measures every shape and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file, written anew after every shape")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no shape after that")
    arguments = parser.parse_args()
    start, rows = time.perf_counter(), []
    for case in CASES:
        if time.perf_counter() - start > arguments.seconds:
            break
        rows.append(measure(case))
        print(summary(rows[-1]), flush=True)
        record = {
            "device": jax.devices()[0].device_kind, "jax": jax.__version__,
            "command": "python -m benchmarks.linear_attention_kernel " + shlex.join(sys.argv[1:]),
            "rows": rows,
        }  # fmt: skip
        if arguments.out:
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def summary(row: dict) -> str:
    """One line: errors, then kernel (call) milliseconds and share of the floor."""
    parts = [row["case"], " ".join(f"{k} {v:.1e}" for k, v in row["errors"].items())]
    for name in ("mosaic_gpu", "xla"):
        for key in ("forward", "forward_backward"):
            if name in row:
                t = row[name][key]
                share = f" {t['floor_share']:.0%}" if "floor_share" in t else ""
                parts.append(f"{name} {key} {t['kernel_ms']:.3f} ({t['call_ms']:.3f}) ms{share}")
    return " | ".join(parts)


if __name__ == "__main__":
    main()
