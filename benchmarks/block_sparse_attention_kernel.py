"""Checks, times and tunes the block-sparse attention kernels on one Hopper GPU.

    python -m benchmarks.block_sparse_attention_kernel \
        --out benchmarks/h200/block_sparse_attention_kernel.json

Of every case, all outputs and gradients, through the log-sum-exp too, are compared with the XLA
form in float64 on fresh random inputs, after filling the memory that outputs are allocated from
with NaN. Then it is timed, beside its peers in the same run; last come other launch parameters. A
case that fails is reported and does not end the run: the script then ends with an error. The record
is written anew after every case, and a short table is printed at the end.

Times are the sum of the kernels of one call, those that sort the lists included (CUPTI, median of
9, or 2 of slow calls), and the wall time of a call with its host work. Programs are compiled side
by side before anything is timed.

`--rehearse` runs all of it at tiny sizes on a CPU, in the simulator; its times mean nothing.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "--rehearse" in sys.argv:
    os.environ["JAX_PLATFORMS"] = "cpu"
    # The simulator runs every warpgroup on a thread of its own.
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernels
from lcattn.ops import (
    BlockPlan,
    block_mask_plan,
    block_sparse_attention,
    causal_plan,
    sliding_window_plan,
)
from lcattn.ops.block_sparse_attention.entries import entries
from lcattn.testing.plans import random_plan
from pallas_kernels.block_sparse_attention.config import LaunchConfig
from pallas_kernels.block_sparse_attention.mosaic_gpu import (
    block_sparse_attention as attend_by_kernel,
)

Form = Callable[..., Any]  # of q, k, v and a plan
TOLERANCE = {jnp.bfloat16: 1e-2, jnp.float16: 2e-3}
OUTPUTS = ("out", "lse", "dq", "dk", "dv")
PASSES = {"forward": False, "forward_backward": True}


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape and its plan.

    Attributes:
      kind: what the plan is.
      plan: makes it.
      config: launch parameters, or None for the default ones.
      reference_heads: heads that are compared with the reference, or None for all; 0 for a shape
        whose like is compared.
      peers: what is timed beside the kernels, of "cudnn_softmax" and "xla".
      simulated: whether to run in the simulator.
    """

    kind: str
    plan: Callable[["Case"], BlockPlan]
    B: int = 1
    T: int = 32768
    N: int = 16
    K: int = 16
    H: int = 128
    dtype: Any = jnp.bfloat16
    config: LaunchConfig | None = None
    reference_heads: int | None = None
    peers: tuple[str, ...] = ()
    simulated: bool = False

    @property
    def name(self) -> str:
        """As tables spell it."""
        sizes = f"{self.kind} B={self.B} T={self.T} N={self.N} K={self.K} H={self.H}"
        return sizes if self.dtype is jnp.bfloat16 else f"{sizes} {np.dtype(self.dtype)}"

    def tiny(self) -> "Case":
        """The same in sizes for the simulator."""
        return dataclasses.replace(
            self, B=1, T=300 if self.T % 1000 == 0 else 256, N=2 if self.N > self.K else 1, K=1,
            H=64, reference_heads=None, simulated=True,
        )  # fmt: skip

    def inputs(self, seed: int) -> tuple[jax.Array, ...]:
        """q, k, v and the gradients of the output and of the log-sum-exp."""
        keys = jax.random.split(jax.random.key(seed), 5)
        arrays = tuple(
            jax.random.normal(key, (self.B, self.T, heads, self.H), self.dtype)
            for key, heads in zip(keys, (self.N, self.K, self.K, self.N), strict=False)
        )
        return *arrays, jax.random.normal(keys[4], (self.B, self.T, self.N))

    def ours(self, q: jax.Array, k: jax.Array, v: jax.Array, plan: BlockPlan):
        """The kernels; output and log-sum-exp."""
        plan = plan.cleared()
        return attend_by_kernel(
            q, k, v, entries(plan), tuple(plan.seen), query_block=plan.query_block,
            key_block=plan.key_block, scale=self.H**-0.5, config=self.config,
            interpret=self.simulated,
        )  # fmt: skip

    def forms(self) -> dict[str, Form]:
        """Ours and its peers."""

        def cudnn(q, k, v, plan):
            del plan
            peer = "xla" if self.simulated else "cudnn"
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=peer)

        peers = {"cudnn_softmax": cudnn, "xla": reference}
        return {"mosaic_gpu": self.ours} | {name: peers[name] for name in self.peers}

    def floor(self, plan: BlockPlan, *, backward: bool) -> float:
        """Seconds: the largest of matrix work, powers of two and traffic.

        A score of a listed block, of those that a causal query sees, takes two products forward and
        five back.
        """
        density = np.asarray(plan.density(), np.float64).mean()
        scores = self.B * self.N * self.T * (self.T + 1) / 2 * min(density, 1)
        products, powers, size = 2, 1, self.B * self.T * self.H * 2 * (2 * self.N + 2 * self.K)
        if backward:
            products, powers, size = 7, 2, 3 * size
        return max(
            scores * products * 2 * self.H / kernels.MATRIX_RATE,
            scores * powers / kernels.TRANSCENDENTAL_RATE,
            size / kernels.BANDWIDTH,
        )

    def errors(self) -> dict[str, float]:
        """Relative RMS errors of all outputs and gradients."""
        if self.reference_heads == 0:
            return {}
        *arrays, g, g_lse = self.inputs(seed=time.time_ns() % 2**31)
        kernels.poison()
        run, heads = program(self, "mosaic_gpu", backward=True), slice(self.reference_heads)
        got = [
            np.asarray(x[:, :, heads], np.float64) for x in run(*arrays, plan_of(self), g, g_lse)
        ]
        with jax.enable_x64(True):
            *wide, g, g_lse = (x[:, :, heads].astype(jnp.float64) for x in (*arrays, g, g_lse))
            want = definition(self)(*wide, self.compared(), g, g_lse)
        return {
            name: float(np.linalg.norm(a - b) / np.linalg.norm(b))
            for name, a, b in zip(OUTPUTS, got, map(np.asarray, want), strict=True)
        }

    def compared(self) -> BlockPlan:
        """The plan of the heads that are compared."""
        heads = slice(self.reference_heads)
        return jax.tree.map(lambda x: x[:, heads] if x.shape[1] == self.N else x, plan_of(self))

    def times(self, form: str, *, backward: bool) -> dict[str, Any]:
        """Times of a form, as `kernels.times` gives them."""
        *arrays, g, g_lse = self.inputs(seed=0)
        arguments = [*arrays, plan_of(self), *((g, g_lse) if backward else ())]
        compiled = program(self, form, backward=backward)
        if not self.simulated:
            return kernels.times(compiled, *arguments)
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        milliseconds = 1e3 * (time.perf_counter() - start)
        return {"kernels": [], "kernel_ms": milliseconds, "call_ms": milliseconds}

    def prepare(self) -> None:
        """Compiles everything that is measured."""
        for form in self.forms():
            for backward in PASSES.values():
                program(self, form, backward=backward)
        if self.reference_heads != 0:
            definition(self)

    def measure(self) -> dict[str, Any]:
        """One row of the record."""
        plan, errors = plan_of(self), self.errors()
        row: dict[str, Any] = {
            "case": self.name, "errors": errors,
            # A NaN is not below the tolerance either.
            "passed": all(error <= TOLERANCE[self.dtype] for error in errors.values()),
        }  # fmt: skip
        for name in self.forms():
            row[name] = {which: self.times(name, backward=back) for which, back in PASSES.items()}
        for which, ours in row["mosaic_gpu"].items():
            ours["floor_ms"] = 1e3 * self.floor(plan, backward=PASSES[which])
            ours["floor_share"] = ours["floor_ms"] / ours["kernel_ms"]
        return row

    def variant(self) -> dict[str, Any]:
        """The milliseconds of each kernel with the case's launch parameters."""
        times = self.times("mosaic_gpu", backward=True)
        changed = {
            k: v for k, v in dataclasses.asdict(self.config or LaunchConfig()).items()
            if v != getattr(LaunchConfig(), k)
        }  # fmt: skip
        return {"case": self.name, "changed": changed, **times}


@functools.cache
def plan_of(case: Case) -> BlockPlan:
    """Its plan, made once."""
    return case.plan(case)


@functools.cache
def program(case: Case, form: str, *, backward: bool):
    """A form, or its values and gradients, compiled once."""
    run, (*arrays, g, g_lse) = case.forms()[form], jax.eval_shape(lambda: case.inputs(0))
    arguments = [*arrays, plan_of(case), *((g, g_lse) if backward else ())]
    return jax.jit(with_gradients(run) if backward else run).lower(*arguments).compile()


@functools.cache
def definition(case: Case):
    """The XLA form in float64 of the heads that are compared, compiled once."""
    heads = slice(case.reference_heads)
    with jax.enable_x64(True):
        *wide, g, g_lse = jax.eval_shape(
            lambda: [x[:, :, heads].astype(jnp.float64) for x in case.inputs(0)]
        )
        return jax.jit(with_gradients(reference)).lower(*wide, case.compared(), g, g_lse).compile()


def reference(q: jax.Array, k: jax.Array, v: jax.Array, plan: BlockPlan):
    """The op's XLA form; output and log-sum-exp."""
    return block_sparse_attention(q, k, v, plan, return_lse=True, implementation="xla")


def with_gradients(form: Form) -> Form:
    """All outputs and gradients, as one function of q, k, v, the plan, and their gradients."""

    def run(q, k, v, plan, g, g_lse):
        out, pull = jax.vjp(lambda q, k, v: form(q, k, v, plan), q, k, v)
        if not isinstance(out, tuple):
            return out, *pull(g)
        out, lse = out
        return out, jnp.where(jnp.isneginf(lse), 0, lse), *pull((g, g_lse.astype(lse.dtype)))

    return run


def causal(case: Case) -> BlockPlan:
    """All keys up to the query."""
    return causal_plan(case.T)


def window(case: Case) -> BlockPlan:
    """A window with sinks over documents of unequal lengths, with padding at the end."""
    edges = jnp.linspace(0, 1, 6)[1:-1] ** 1.5 * case.T
    index = jnp.arange(case.T)
    ids = jnp.searchsorted(edges.astype(jnp.int32), index, side="right").astype(jnp.int32)
    ids = jnp.where(index < case.T - case.T // 50, ids, -1)
    ids = jnp.broadcast_to(ids, (case.B, case.T))
    return sliding_window_plan(case.T, case.T // 4, sinks=3, segment_ids=ids, key_block=256)


def weighted(case: Case) -> BlockPlan:
    """Random lists, log-weights and rules of each head, some of them empty; small blocks."""
    seed = time.time_ns() % 2**31
    return random_plan(case.B, case.T, case.T, case.N, query_block=64, key_block=64, seed=seed)


def tenth(case: Case) -> BlockPlan:
    """A tenth of the blocks at random, others for each head, and each block's own."""
    m = -(-case.T // 128)
    draw = np.random.default_rng(0).random((1, case.N, m, m)) < 0.1
    return block_mask_plan(jnp.asarray(draw | np.eye(m, dtype=bool)), case.T)


CASES = {
    "long": Case("causal", causal, reference_heads=1, peers=("cudnn_softmax", "xla")),
    "packed": Case("window, sinks, documents", window, B=2, T=3000, N=8, K=2, H=64),
    "narrow": Case(
        "random lists, weighted", weighted, B=2, T=1000, N=4, K=4, H=64, dtype=jnp.float16
    ),
    "grouped": Case("random lists, weighted", weighted, T=2048, N=4, K=2),
    "sparse": Case("a tenth of the blocks", tenth, T=131072, reference_heads=1),
    "dense": Case("causal", causal, T=131072, reference_heads=0),
}
VARIANTS = [LaunchConfig(query_gradient_width=128), LaunchConfig(takes_turns=False)]


def summary(rows: dict[str, Any], variants: list[Any], failed: list[str]) -> list[str]:
    """The short table: what was asked for, and what was reached."""

    def ms(name: str, form: str, which: str) -> float:
        return rows[name][form][which]["kernel_ms"] if name in rows else math.nan

    lines = [
        f"{row['case']}: {'right' if row['passed'] else 'WRONG'}, "
        + " ".join(f"{k} {v:.1e}" for k, v in row["errors"].items())
        for row in rows.values()
    ]
    for which, goal in (("forward", 0.95), ("forward_backward", 0.85)):
        ours, cudnn = (ms("long", form, which) for form in ("mosaic_gpu", "cudnn_softmax"))
        lines.append(
            f"causal, {which}: {ours:.2f} ms, cuDNN {cudnn:.2f} ms: {cudnn / ours:.2f}x its speed "
            f"(to reach: {goal}x)"
        )
    few, all_blocks = (ms(name, "mosaic_gpu", "forward") for name in ("sparse", "dense"))
    lines.append(
        f"a tenth of the blocks, forward: {few:.2f} ms, all {all_blocks:.2f} ms: "
        f"{all_blocks / few:.2f}x faster (to reach: 8x)"
    )
    for row in sorted(variants, key=lambda row: row["kernel_ms"]):
        longest = ", ".join(
            f"{kernel['name'].removeprefix('block_sparse_attention_')[:15]} {kernel['ms']:.2f}"
            for kernel in row["kernels"][:3]
        )
        lines.append(f"{row['kernel_ms']:.2f} ms with {row['changed'] or 'defaults'} {longest}")
    return [*lines, f"failed: {failed or 'none'}"]


def main() -> int:
    """Measures every case, then every variant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file, written anew after every case")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no case after that")
    parser.add_argument("--only", nargs="*", choices=(*CASES, "variants"), help="default: all")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU")
    arguments = parser.parse_args()
    only = arguments.only or (*CASES, "variants")
    work = [(name, case, Case.measure) for name, case in CASES.items() if name in only]
    if "variants" in only:
        work += [
            ("variant", dataclasses.replace(CASES["long"], config=config), Case.variant)
            for config in VARIANTS
        ]
    if arguments.rehearse:
        work = [(name, case.tiny(), measure) for name, case, measure in work]
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(1 if arguments.rehearse else 8) as pool:
        # What fails here fails again where it is measured, and is reported there.
        concurrent.futures.wait([pool.submit(case.prepare) for _, case, _ in work])
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    rows: dict[str, Any] = {}
    variants: list[Any] = []
    failed: list[str] = []
    for name, case, measure in work:
        if time.perf_counter() - start > arguments.seconds:
            failed.append(f"{name} {case.config or ''}: not started, out of time")
            continue
        try:
            row = measure(case)
        except Exception as error:  # the other cases still tell something
            failed.append(f"{name} {case.config or ''}: {type(error).__name__}: {error}"[:600])
            print(failed[-1], flush=True)
            continue
        if measure is Case.measure:
            rows[name] = row
        else:
            variants.append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "kernels"})[:600], flush=True)
        kernels.save(
            arguments.out, "block_sparse_attention_kernel", rows=list(rows.values()),
            variants=variants, summary=summary(rows, variants, failed),
        )  # fmt: skip
    print("\n".join(summary(rows, variants, failed)), flush=True)
    return int(bool(failed) or not all(row["passed"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
