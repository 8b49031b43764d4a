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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.compiling import UNTUNED, compile_all
from benchmarks.kernels import BANDWIDTH, poison, save, times
from lcattn import ops
from lcattn.ops.linear_attention.features import FeatureMap


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """Linear attention, state in and state out.

    Attributes:
      feature_map: as the op takes it.
      F, H: sizes of keys and values.
      B: streams.
      N: heads.
      steps: of one call. Several are a loop, whose counter, slices and writes of outputs are
        kernels too; one is the step alone.
    """

    feature_map: FeatureMap
    F: int
    H: int
    B: int
    N: int = 16
    steps: int = 128

    @property
    def name(self) -> str:
        """As the table spells it."""
        loop = "" if self.steps == 1 else f", loop of {self.steps}"
        sizes = f"N={self.N} F={self.F} H={self.H}, B={self.B}"
        return f"linear, {self.feature_map}, {sizes}{loop}"

    def inputs(self, seed) -> tuple[Any, ...]:
        """A state, and the tokens that continue it."""
        state = ops.linear_attention_state(
            self.B, self.N, self.F, self.H, feature_map=self.feature_map
        )
        state = dataclasses.replace(state, kv=normal(seed, 3, state.kv.shape).astype(jnp.float32))
        if state.normalizer is not None:  # as of 100 keys of zeros: far from 0 for every query
            state = dataclasses.replace(state, normalizer=state.normalizer.at[..., 0].set(100))
        shapes = ((self.B, self.steps, self.N, size) for size in (self.F, self.F, self.H))
        return state, *(normal(seed, i, shape) for i, shape in enumerate(shapes))

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
        """The outputs of one head by the definition."""
        state = jax.tree.map(lambda x: x[:, :1], state)
        return ops.linear_attention(
            *(x[:, :, :1] for x in (q, k, v)), feature_map=self.feature_map, initial_state=state,
            implementation="reference",
        )  # fmt: skip

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

    def inputs(self, seed) -> tuple[Any, ...]:
        """A cache and one query, the cache's last token."""
        cache = (self.B, self.S, self.K, self.H)
        shapes = [(self.B, 1, self.N, self.H), cache, cache]
        q, k, v = (normal(seed, i, shape) for i, shape in enumerate(shapes))
        return q, k, v, jnp.int32(self.S - 1)

    def run(self, q, k, v, position):
        """The output."""
        return self._attend(None, q, k, v, position), ()

    def reference(self, q, k, v, position):
        """The output of the heads that share the first keys, by the definition."""
        own = (q[:, :, : self.N // self.K], k[:, :, :1], v[:, :, :1])
        return self._attend("reference", *own, position)

    def _attend(self, implementation, q, k, v, position):
        options: dict[str, Any] = {"power": 15.0} if self.op == "softplus_attention" else {}
        attend = functools.partial(getattr(ops, self.op), implementation=implementation, **options)
        return attend(q, k, v, query_position=position)

    def bytes(self, q, k, v, position) -> int:
        """Read in one step."""
        del q, position
        return k.nbytes + v.nbytes


Case = Linear | Attention
_TAYLOR: dict[str, Any] = {"feature_map": "taylor", "F": 16, "H": 64}
_IDENTITY: dict[str, Any] = {"feature_map": "identity", "F": 128, "H": 128}


def cases(size: str) -> Iterator[Case]:
    """What is measured, the targets first."""
    tiny = size == "tiny"
    slots = 64 if tiny else 4096
    for B in (2,) if tiny else (64, 128, 1, 16):
        for kind in (_TAYLOR, _IDENTITY):
            yield Linear(**kind, B=B)
            if B in (2, 64):
                yield Linear(**kind, B=B, steps=1)
        if B in (2, 64, 1):
            yield Attention(op="softplus_attention", B=B, S=slots, N=16, K=16, H=128)
            yield Attention(op="softplus_attention", B=B, S=slots, N=32, K=8, H=128)
    if tiny:
        yield Attention(op="softmax_attention", B=1, S=256, N=32, K=4, H=128)
        return
    for H in (64, 128):
        yield Attention(op="softmax_attention", B=1, S=2**17, N=16, K=16, H=H)
    for S, B in itertools.product((2**17, 2**19), (1, 16)):
        yield Attention(op="softmax_attention", B=B, S=S, N=32, K=4, H=128)


def normal(seed, index: int, shape: tuple[int, ...]) -> jax.Array:
    """Normal numbers in bfloat16 for one stream, and multiples of them for the others."""
    first, others = jax.random.split(jax.random.fold_in(jax.random.key(seed), index))
    factors = jax.random.normal(others, (shape[0], *(1 for _ in shape[1:])), jnp.bfloat16)
    return jax.random.normal(first, (1, *shape[1:]), jnp.bfloat16) * factors.at[0].set(1)


class Programs(NamedTuple):
    """What a case runs, compiled."""

    inputs: Any
    run: Any
    reference: Any


def compiled(case: Case) -> Programs:
    """The inputs of a seed, the step, and the outputs of one stream by the definition."""
    inputs = jax.jit(case.inputs).lower(0)
    arrays = inputs.out_info
    run = jax.jit(case.run).lower(*arrays)
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), jnp.float64) if x.ndim else x, arrays
        )
        reference = jax.jit(case.reference).lower(*wide).compile(UNTUNED)
        return Programs(inputs.compile(), run.compile(), reference)


def error(programs: Programs) -> float:
    """Relative RMS error of some heads of one stream, on fresh random inputs."""
    arrays = programs.inputs(time.time_ns() % 2**30)
    poison()
    out, _ = programs.run(*arrays)
    with jax.enable_x64(True):
        first = jax.tree.map(lambda x: x[:1].astype(jnp.float64) if x.ndim else x, arrays)
        want = np.asarray(programs.reference(*first))
    got = np.asarray(out[:1, :, : want.shape[2]], np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def measure(case: Case, programs: Programs) -> dict[str, Any]:
    """One row of the record."""
    row = {"case": case.name, "error": error(programs)}
    arrays = programs.inputs(0)
    timed = times(programs.run, *arrays)
    milliseconds, moved = timed["kernel_ms"] / case.steps, case.bytes(*arrays)
    floor = 1e3 * moved / BANDWIDTH
    return row | {
        "ms": milliseconds, "bytes": moved, "floor_ms": floor, "floor_share": floor / milliseconds,
        "extra_megabytes": timed["extra_megabytes"], "kernels": timed["kernels"],
    }  # fmt: skip


def compiled_sum(size: str) -> Any:
    """The program that sums an array far larger than any cache."""
    x = jax.ShapeDtypeStruct(((2**16 if size == "tiny" else 2**31) // 2,), jnp.bfloat16)
    return jax.jit(lambda x: x.astype(jnp.float32).sum()).lower(x).compile()


def read_rate(program: Any) -> float:
    """Bytes a second of the program that sums."""
    (x,) = (jnp.ones(x.shape, x.dtype) for x in program.in_avals[0])
    return 1e3 * x.nbytes / times(program, x)["kernel_ms"]


def main() -> None:
    """Measures every case and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("h200", "tiny"), default="h200")
    parser.add_argument("--out", type=Path, help="JSON file, written anew after every case")
    arguments = parser.parse_args()
    start = time.perf_counter()
    programs: dict[Any, Any] = compile_all(
        {"sum": functools.partial(compiled_sum, arguments.size)}
        | {case: functools.partial(compiled, case) for case in cases(arguments.size)}
    )
    print(f"compiled after {time.perf_counter() - start:.0f} s", flush=True)
    rate = read_rate(programs.pop("sum"))
    rows, failed = [], []
    for case, compiled_case in programs.items():
        try:
            row = measure(case, compiled_case)
            rows.append(row)
            print(
                f"{row['case']} | error {row['error']:.1e} | {row['ms']:.4f} ms, "
                f"{row['bytes'] / 1e9:.3f} GB: {row['floor_share']:.0%} of {BANDWIDTH / 1e12} TB/s",
                flush=True,
            )
        except Exception as error:  # the others are worth having
            failed.append({"case": case.name, "error": repr(error)[:1000]})
            print(failed[-1], flush=True)
        save(arguments.out, "decode", bandwidth=BANDWIDTH, read_rate=rate, rows=rows, failed=failed)


if __name__ == "__main__":
    main()
