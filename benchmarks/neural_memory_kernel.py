"""Checks and times the neural-memory kernels on one Hopper GPU, beside the XLA form.

    python -m benchmarks.neural_memory_kernel --out benchmarks/h200/neural_memory_kernel.json

Of every shape that is checked, the output and all gradients, those of gates and network too, are
compared with the XLA form in float64 on fresh random inputs, after filling the memory that outputs
are allocated from with NaN; a second call has to repeat the first bit by bit. Then forward, and
forward and backward, are timed: the sum of the kernels of one call (CUPTI, median of 9), and the
wall time of a call with its host work (median of 30). With projections, a call starts from tokens
of that width: queries, keys and values of norm 1 and gates are made of them, and answers are
projected back.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernels
from lcattn.ops import neural_memory

CHUNK = 64
CHAIN = 1.2e-6
"""Seconds that the walk needs for a chunk, from below.

A chunk waits for the one before it through four products, an activation, and a sum over a cluster:
about 0.1 us each, 0.25 us, and 0.5 us (`pallas_kernels/neural_memory/gpu_walk.py`).
"""

NAMES = ("out", "dq", "dk", "dv", "dlearning_rate", "dmomentum", "ddecay", "dfirst", "dsecond")


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape.

    Attributes:
      F: hidden units.
      width: of tokens that are projected, or None to start from queries, keys, values and gates.
      checked: whether gradients are compared; else only timed, being a longer one of the same.
      timed: whether it is timed.
    """

    B: int
    T: int
    N: int = 4
    M: int = 4
    F: int = 256
    width: int | None = None
    checked: bool = False
    timed: bool = True

    @property
    def name(self) -> str:
        """As the table spells it."""
        sizes = f"B={self.B} T={self.T} N={self.N} M={self.M} H=64 hidden={self.F}"
        return sizes if self.width is None else f"{sizes} projections={self.width}"

    def inputs(self, seed: int) -> tuple[Any, ...]:
        """What `run` takes, and the gradient of the output."""
        keys = iter(jax.random.split(jax.random.key(seed), 12))

        def normal(*shape, dtype=jnp.float32):
            return jax.random.normal(next(keys), shape, dtype)

        network = [normal(self.M, i, o) / i**0.5 for i, o in ((CHUNK, self.F), (self.F, CHUNK))]
        if self.width is not None:
            sizes = CHUNK * (self.N + 2 * self.M) + 3 * self.M, CHUNK * self.N
            weights = (
                normal(i, o, dtype=jnp.bfloat16) / i**0.5
                for i, o in ((self.width, sizes[0]), (sizes[1], self.width))
            )
            tokens, g = (normal(self.B, self.T, self.width, dtype=jnp.bfloat16) for _ in range(2))
            return tokens, *weights, network, g
        heads = [normal(self.B, self.T, n, CHUNK) for n in (self.N, self.M, self.M, self.N)]
        q, k, v, g = (unit(x).astype(jnp.bfloat16) for x in heads)
        rate, momentum, decay = (
            most * jax.random.uniform(next(keys), (self.B, self.T, self.M))
            for most in (0.5 / CHUNK, 0.9, 0.02)
        )
        return q, k, v, rate, momentum, decay, network, g

    def form(self, implementation: str) -> Callable:
        """A function of all inputs but the gradient."""

        def run(q, k, v, rate, momentum, decay, network) -> Any:
            return neural_memory(
                q, k, v, rate, momentum, decay, network, implementation=implementation
            )

        def projected(tokens, inwards, outwards, network):
            shape, ends = tokens.shape[:2], np.cumsum([self.N, self.M, self.M]) * CHUNK
            *heads, gates = jnp.split(tokens @ inwards, ends, axis=-1)
            q, k, v = (
                unit(x.reshape(*shape, -1, CHUNK).astype(jnp.float32)).astype(x.dtype)
                for x in heads
            )
            gates = jax.nn.sigmoid(gates.astype(jnp.float32) - 2)
            rate, momentum, decay = jnp.split(gates, 3, axis=-1)
            out = run(q, k, v, rate * (1 - momentum) / CHUNK, momentum, decay / CHUNK, network)
            return out.reshape(*shape, -1) @ outwards

        return run if self.width is None else projected

    def floor(self, *, backward: bool) -> float:
        """Seconds: the largest of matrix work, traffic and the walk's chain."""
        H, C = 64, CHUNK
        products = 7 * H * self.F * self.M + (4 * H * self.F + 2 * C * (H + self.F)) * self.N
        size = 4 * H * (self.N + self.M) + 12 * self.M
        tokens = self.B * self.T
        work = tokens * 2 * products / kernels.MATRIX_RATE
        traffic = tokens * size / kernels.BANDWIDTH
        chain = CHAIN * self.T / C
        return max(3 * work, 3 * traffic, 2 * chain) if backward else max(work, traffic, chain)

    def errors(self) -> dict[str, float]:
        """Relative RMS errors of output and gradients."""
        *arrays, g = self.inputs(seed=time.time_ns() % 2**31)
        run = jax.jit(kernels.gradients(self.form("mosaic_gpu"))).lower(*arrays, g).compile()
        kernels.poison()
        got = jax.tree.leaves(run(*arrays, g))
        again = jax.tree.leaves(run(*arrays, g))
        same = all(bool((a == b).all()) for a, b in zip(got, again, strict=True))
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda x: x.astype(jnp.float64), (*arrays, g))
            want = jax.tree.leaves(jax.jit(kernels.gradients(self.form("xla")))(*wide))
            want = [np.asarray(x) for x in want]
        errors = {
            name: float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))
            for name, a, b in zip(NAMES, got, want, strict=True)
        }
        return {**errors, "differs_when_repeated": 0.0 if same else 1.0}

    def measure(self) -> dict[str, Any]:
        """One row of the record."""
        row: dict[str, Any] = {"case": self.name, **dataclasses.asdict(self)}
        if self.checked:
            row["errors"] = self.errors()
        if not self.timed:
            return row
        *arrays, g = self.inputs(seed=0)
        for name in ("mosaic_gpu", "xla"):
            form = self.form(name)
            both = jax.jit(kernels.gradients(form)).lower(*arrays, g).compile()
            row[name] = {
                "forward": kernels.times(jax.jit(form).lower(*arrays).compile(), *arrays),
                "forward_backward": kernels.times(both, *arrays, g),
            }
        for which, times in row["mosaic_gpu"].items():
            times["floor_ms"] = 1e3 * self.floor(backward=which != "forward")
            times["floor_share"] = times["floor_ms"] / times["kernel_ms"]
        return row


def unit(x: jax.Array) -> jax.Array:
    """Scaled to norm 1."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


CASES = [
    Case(1, 300, N=2, M=1, F=128, checked=True, timed=False),
    Case(4, 8192),
    Case(4, 8192, width=384),
    Case(2, 1024, checked=True, timed=False),
    Case(4, 8192, F=64),
    Case(1, 32768),
    Case(4, 2048),
]


def main() -> None:
    """Checks and times every shape, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file, written anew after every shape")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start none after that")
    arguments = parser.parse_args()
    start, rows = time.perf_counter(), []
    for case in CASES:
        if time.perf_counter() - start > arguments.seconds:
            break
        rows.append(case.measure())
        print(kernels.summary({"errors": {}, **rows[-1]}), flush=True)
        kernels.save(arguments.out, "neural_memory_kernel", rows=rows)


if __name__ == "__main__":
    main()
