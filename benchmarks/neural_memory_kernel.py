"""Checks and times the neural-memory kernels on one Hopper GPU, beside the XLA form.

    python -m benchmarks.neural_memory_kernel --out benchmarks/h200/neural_memory_kernel.json

Of every shape, the output and all gradients, those of gates and network too, are compared with the
XLA form in float64 on fresh random inputs, after filling the memory that outputs are allocated from
with NaN; the record names what later calls did not repeat bit by bit, and in how many. Then
forward, and forward and backward, are timed: the sum of the kernels of one call (CUPTI, median of
9), and the wall time of a call with its host work (median of 30). With projections, a call starts
from tokens of that width, as the mixer does: one projection makes queries, keys and values, of norm
1, another the gates, and answers are projected back.
"""

import argparse
import dataclasses
import itertools
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernels
from benchmarks.compiling import UNTUNED, Workers
from lcattn.ops import neural_memory

CHUNK = 64
CALLS = 50
"""That are compared with the first."""
FORMS = ("mosaic_gpu", "xla")
PASSES = {"forward": False, "forward_backward": True}
CHAIN = 1.2e-6
"""Seconds that the walk needs for a chunk, from below.

A chunk waits for the one before it through four products, an activation, and a sum over a cluster:
about 0.1 us each, 0.25 us, and 0.5 us (`pallas_kernels/neural_memory/gpu_walk.py`).
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape.

    Attributes:
      H: numbers of queries, keys and values.
      hidden: units of a memory of two layers, or None for one of one layer.
      documents: in each row, all about as long, or None for rows that are not packed.
      projections: width of tokens that are projected, or None to start from queries, keys, values
        and gates.
    """

    B: int
    T: int
    N: int = 4
    M: int = 4
    H: int = 64
    hidden: int | None = 256
    documents: int | None = None
    projections: int | None = None

    @property
    def name(self) -> str:
        """As the table spells it."""
        sizes = f"B={self.B} T={self.T} N={self.N} M={self.M} H={self.H}"
        for name in ("hidden", "documents", "projections"):
            value = getattr(self, name)
            sizes += "" if value is None else f" {name}={value}"
        return sizes

    def inputs(self, seed: int) -> tuple[Any, ...]:
        """All inputs, the network last but one, and the gradient of the output."""
        H, keys = self.H, iter(jax.random.split(jax.random.key(seed), 12))

        def normal(*shape, dtype=jnp.float32):
            return jax.random.normal(next(keys), shape, dtype)

        hidden = () if self.hidden is None else (self.hidden,)
        network = [normal(self.M, i, o) / i**0.5 for i, o in itertools.pairwise((H, *hidden, H))]
        if self.projections is not None:
            width = self.projections
            inwards, gates, outwards = (
                normal(i, o, dtype=jnp.bfloat16) / i**0.5
                for i, o in (
                    (width, H * (self.N + 2 * self.M)), (width, 3 * self.M), (H * self.N, width)
                )
            )  # fmt: skip
            tokens, g = (normal(self.B, self.T, width, dtype=jnp.bfloat16) for _ in range(2))
            return tokens, inwards, gates, outwards, network, g
        q, k, v, g = (
            unit(normal(self.B, self.T, heads, H)).astype(jnp.bfloat16)
            for heads in (self.N, self.M, self.M, self.N)
        )
        gates = (
            most * jax.random.uniform(next(keys), (self.B, self.T, self.M))
            for most in (0.5 / CHUNK, 0.9, 0.02)
        )
        return q, k, v, *gates, network, g

    @property
    def names(self) -> list[str]:
        """What is checked: the output, and gradients of inputs and layers."""
        inputs = ["q", "k", "v", "learning_rate", "momentum", "decay"]
        if self.projections is not None:
            inputs = ["tokens", "inwards", "gates", "outwards"]
        layers = ["first", "second"] if self.hidden else ["first"]
        return ["out", *(f"d_{name}" for name in (*inputs, *layers))]

    def form(self, implementation: str) -> Callable:
        """A function of all inputs but the gradient."""
        H, ids = self.H, None
        if self.documents is not None:
            row = jnp.arange(self.T, dtype=jnp.int32) * self.documents // self.T
            ids = jnp.broadcast_to(row, (self.B, self.T))

        def run(q, k, v, rate, momentum, decay, network) -> Any:
            return neural_memory(
                q, k, v, rate, momentum, decay, network, segment_ids=ids,
                implementation=implementation,
            )  # fmt: skip

        def projected(tokens, inwards, gates, outwards, network):
            shape, ends = tokens.shape[:2], np.cumsum([self.N, self.M]) * H
            heads = jnp.split(tokens @ inwards, ends, axis=-1)
            q, k, v = (unit(x.reshape(*shape, -1, H)) for x in heads)
            gates = jax.nn.sigmoid((tokens @ gates).astype(network[0].dtype) - 2)
            rate, momentum, decay = jnp.split(gates, 3, axis=-1)
            out = run(q, k, v, rate * (1 - momentum) / CHUNK, momentum, decay / CHUNK, network)
            return out.reshape(*shape, -1) @ outwards

        return run if self.projections is None else projected

    def program(self, form: str, *, backward: bool, wide: bool = False):
        """A form, or its gradients, compiled for the shape; in float64 if it is wide."""
        arrays = jax.eval_shape(lambda: self.inputs(0))
        run = kernels.gradients(self.form(form)) if backward else self.form(form)
        with jax.enable_x64(wide):
            if wide:
                arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float64), arrays)
            lowered = jax.jit(run).lower(*(arrays if backward else arrays[:-1]))
            return lowered.compile(UNTUNED if wide else {})

    def programs(self, workers: Workers) -> dict[Any, Future]:
        """All that `measure` needs, being compiled side by side."""
        compiling: dict[Any, Future] = {
            (form, which): submit(self.program, form, backward=backward)
            for form, submit in (("mosaic_gpu", workers.compile), ("xla", workers.run))
            for which, backward in PASSES.items()
        }
        compiling["reference"] = workers.run(self.program, "xla", backward=True, wide=True)
        return compiling

    def floor(self, *, backward: bool) -> float:
        """Seconds: the largest of matrix work, traffic and the walk's chain."""
        H = self.H
        products = 3 * H * H * self.M + 2 * H * (H + CHUNK) * self.N
        if self.hidden is not None:
            F = self.hidden
            products = 7 * H * F * self.M + (4 * H * F + 2 * CHUNK * (H + F)) * self.N
        size = 4 * H * (self.N + self.M) + 12 * self.M
        if self.projections is not None:
            products += self.projections * H * (2 * self.N + 2 * self.M)
        tokens = self.B * self.T
        work = tokens * 2 * products / kernels.MATRIX_RATE
        traffic = tokens * size / kernels.BANDWIDTH
        chain = CHAIN * self.T / CHUNK
        return max(3 * work, 3 * traffic, 2 * chain) if backward else max(work, traffic, chain)

    def errors(self, ours, reference) -> tuple[dict[str, float], dict[str, int]]:
        """Relative RMS errors of output and gradients, and how many later calls change which."""
        arrays = self.inputs(seed=time.time_ns() % 2**31)
        kernels.poison()
        got = ours(*arrays)
        changed = kernels.changes(got, lambda: ours(*arrays), self.names, CALLS)
        with jax.enable_x64(True):
            want = reference(*jax.tree.map(lambda x: x.astype(jnp.float64), arrays))
        pairs = (
            [np.asarray(x, np.float64) for x in pair]
            for pair in zip(*map(jax.tree.leaves, (got, want)), strict=True)
        )
        errors = (float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)
        return dict(zip(self.names, errors, strict=True)), changed

    def measure(self, programs: dict[Any, Future]) -> dict[str, Any]:
        """One row of the record."""
        ours, reference = (
            programs[key].result() for key in (("mosaic_gpu", "forward_backward"), "reference")
        )
        errors, changed = self.errors(ours, reference)
        row: dict[str, Any] = {
            "case": self.name, **dataclasses.asdict(self), "errors": errors,
            "repeats_exactly": not changed, "later_calls": CALLS, "changed": changed,
        }  # fmt: skip
        arrays = self.inputs(seed=0)
        for form in FORMS:
            row[form] = {
                which: kernels.times(
                    programs[form, which].result(), *(arrays if backward else arrays[:-1])
                )
                for which, backward in PASSES.items()
            }
        for which, times in row["mosaic_gpu"].items():
            times["floor_ms"] = 1e3 * self.floor(backward=PASSES[which])
            times["floor_share"] = times["floor_ms"] / times["kernel_ms"]
        return row


def unit(x: jax.Array) -> jax.Array:
    """Scaled to norm 1, in its own dtype."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.sum(wide**2, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


CASES = [
    Case(4, 8192),
    Case(4, 8192, projections=384),
    Case(4, 8192, hidden=None),
    Case(1, 300, N=2, M=1, hidden=192),
    Case(1, 32768),
    Case(16, 2048),
    Case(4, 8192, hidden=64),
    Case(4, 8192, N=2, M=2, H=128, hidden=512),
    Case(4, 8192, N=2, M=2, H=128, hidden=None),
    # XLA's form skips empty windows, so that it may have to be profiled call by call.
    Case(4, 8192, documents=10),
]


def main() -> None:
    """Checks and times every shape, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file, written anew after every shape")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start none after that")
    parser.add_argument("--cases", type=int, default=len(CASES), help="only so many shapes")
    arguments = parser.parse_args()
    start, cases, rows = time.perf_counter(), CASES[: arguments.cases], []
    with Workers() as workers:
        compiling = [case.programs(workers) for case in cases]
    print(f"compiled after {time.perf_counter() - start:.0f} s", flush=True)
    for case, programs in zip(cases, compiling, strict=True):
        if time.perf_counter() - start > arguments.seconds:
            break
        rows.append(case.measure(programs))
        print(kernels.summary(rows[-1]), flush=True)
        kernels.save(arguments.out, "neural_memory_kernel", rows=rows)


if __name__ == "__main__":
    main()
