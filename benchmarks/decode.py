"""Milliseconds of one token against the bytes that it must move, in one process.

    python -m benchmarks.decode --out benchmarks/h200/decode.json

A token of linear attention reads its state and writes it back; one of attention reads keys and
values of all tokens before it. Nothing else is worth mentioning, so time is compared with these
bytes over the rate of memory. `--size tiny` is a rehearsal for a CPU.
"""

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.kernels import BANDWIDTH, poison, save, times
from lcattn import ops
from lcattn.ops.linear_attention.features import FeatureMap

_STEPS = 8  # of linear attention in one program, so that its state is carried from one to the next


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """Linear attention, state in and state out.

    Attributes:
      feature_map: as the op takes it.
      F, H: sizes of keys and values.
      B: streams.
      N: heads.
    """

    feature_map: FeatureMap
    F: int
    H: int
    B: int
    N: int = 16

    @property
    def name(self) -> str:
        """As the table spells it."""
        return f"linear, {self.feature_map}, N={self.N} F={self.F} H={self.H}, B={self.B}"

    steps = _STEPS

    def inputs(self, seed: int) -> tuple[Any, ...]:
        """A state, and the tokens that continue it."""
        sizes = {"q": self.F, "k": self.F, "v": self.H}
        tokens = tuple(
            normal(seed + i, (self.B, _STEPS, self.N, size))
            for i, size in enumerate(sizes.values())
        )
        state = ops.linear_attention_state(
            self.B, self.N, self.F, self.H, feature_map=self.feature_map
        )
        return state, *tokens

    def run(self, state, q, k, v):
        """Outputs of all steps, and the last state."""

        def step(state, token):
            out, state = ops.linear_attention(
                *(x[:, None] for x in token), feature_map=self.feature_map, initial_state=state,
                return_state=True, implementation="step",
            )  # fmt: skip
            return state, out[:, 0]

        state, out = lax.scan(step, state, tuple(x.swapaxes(0, 1) for x in (q, k, v)))
        return out.swapaxes(0, 1), state

    def reference(self, state, q, k, v):
        """The outputs by the definition."""
        return ops.linear_attention(
            q, k, v, feature_map=self.feature_map, initial_state=state, implementation="reference"
        )

    def bytes(self, state, *tokens) -> int:
        """Read and written in one step."""
        del tokens
        return 2 * sum(x.nbytes for x in jax.tree.leaves(state))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """Attention over a full cache.

    Attributes:
      op: "softmax_attention" or "softplus_attention".
      B: streams.
      S: slots of the cache.
      N, K: query heads and key heads.
      H: size of both.
    """

    op: str
    B: int
    S: int
    N: int
    K: int
    H: int

    @property
    def name(self) -> str:
        """As the table spells it."""
        return (
            f"{self.op.removesuffix('_attention')}, S={self.S} N={self.N} K={self.K} H={self.H}, "
            f"B={self.B}"
        )

    steps = 1

    def inputs(self, seed: int) -> tuple[Any, ...]:
        """A cache and one query, the cache's last token."""
        cache = (self.B, self.S, self.K, self.H)
        q, k, v = (
            normal(seed + i, shape)
            for i, shape in enumerate([(self.B, 1, self.N, self.H), cache, cache])
        )
        return q, k, v, jnp.int32(self.S - 1)

    def run(self, q, k, v, position):
        """The output."""
        return self._attend(None, q, k, v, position), ()

    def reference(self, q, k, v, position):
        """The output by the definition."""
        return self._attend("reference", q, k, v, position)

    def _attend(self, implementation, q, k, v, position):
        options: dict[str, Any] = {"power": 15.0} if self.op == "softplus_attention" else {}
        attend = functools.partial(getattr(ops, self.op), implementation=implementation, **options)
        return attend(q, k, v, query_position=position)

    def bytes(self, q, k, v, position) -> int:
        """Read in one step."""
        del q, position
        return k.nbytes + v.nbytes


Case = Linear | Attention


def cases(size: str) -> Iterator[Case]:
    """What is measured, the targets first."""
    tiny = size == "tiny"
    batches = (2,) if tiny else (64, 1, 4, 16, 128)
    for B in batches:
        yield Linear(feature_map="taylor", F=16, H=64, B=B)
        yield Linear(feature_map="identity", F=128, H=128, B=B)
    for B in batches:
        yield Attention(op="softplus_attention", B=B, S=64 if tiny else 4096, N=16, K=16, H=128)
    for S, B in [(256, 1)] if tiny else itertools.product((2**17, 2**18, 2**19), (1, 4, 16)):
        yield Attention(op="softmax_attention", B=B, S=S, N=32, K=8, H=128)
    if not tiny:
        yield Attention(op="softmax_attention", B=1, S=2**17, N=16, K=16, H=64)
        yield Attention(op="softmax_attention", B=1, S=2**17, N=16, K=16, H=128)
        yield Attention(op="softplus_attention", B=64, S=4096, N=32, K=8, H=128)


def normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """Normal numbers in bfloat16 for one stream, and multiples of them for the others."""

    def draw():
        first, factors = jax.random.split(jax.random.key(seed))
        factors = jax.random.normal(factors, (shape[0], *(1 for _ in shape[1:])), jnp.bfloat16)
        return jax.random.normal(first, (1, *shape[1:]), jnp.bfloat16) * factors.at[0].set(1)

    return jax.jit(draw)()


def error(case: Case, compiled: Callable) -> float:
    """Relative RMS error of the outputs of one stream, on fresh random inputs."""
    arrays = case.inputs(time.time_ns() % 2**30)
    poison()
    got = np.asarray(compiled(*arrays)[0][:1], np.float64)
    with jax.enable_x64(True):
        first = jax.tree.map(lambda x: x[:1].astype(jnp.float64) if x.ndim else x, arrays)
        want = np.asarray(jax.jit(case.reference)(*first))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def measure(case: Case) -> dict[str, Any]:
    """One row of the record."""
    arrays = jax.eval_shape(lambda: case.inputs(0))
    compiled = jax.jit(case.run).lower(*arrays).compile()
    row: dict[str, Any] = {"case": case.name, "error": error(case, compiled)}
    arrays = case.inputs(0)
    timed = times(compiled, *arrays)
    milliseconds, moved = timed["kernel_ms"] / case.steps, case.bytes(*arrays)
    floor = 1e3 * moved / BANDWIDTH
    return row | {
        "ms": milliseconds, "bytes": moved, "floor_ms": floor, "floor_share": floor / milliseconds,
        "extra_megabytes": timed["extra_megabytes"], "kernels": timed["kernels"],
    }  # fmt: skip


def read_rate(size: str) -> float:
    """Bytes a second of summing an array far larger than any cache."""
    x = jnp.ones((2**16 if size == "tiny" else 2**31) // 2, jnp.bfloat16)
    compiled = jax.jit(lambda x: x.astype(jnp.float32).sum()).lower(x).compile()
    return 1e3 * x.nbytes / times(compiled, x)["kernel_ms"]


def main() -> None:
    """Measures every case and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("h200", "tiny"), default="h200")
    parser.add_argument("--out", type=Path, help="JSON file, written anew after every case")
    arguments = parser.parse_args()
    fields: dict[str, Any] = {"bandwidth": BANDWIDTH, "read_rate": read_rate(arguments.size)}
    print(fields, flush=True)
    rows = []
    for case in cases(arguments.size):
        rows.append(measure(case))
        row = rows[-1]
        print(
            f"{row['case']} | error {row['error']:.1e} | {row['ms']:.4f} ms, "
            f"{row['bytes'] / 1e9:.3f} GB: {row['floor_share']:.0%} of {BANDWIDTH / 1e12} TB/s",
            flush=True,
        )
        save(arguments.out, "decode", **fields, rows=rows)


if __name__ == "__main__":
    main()
