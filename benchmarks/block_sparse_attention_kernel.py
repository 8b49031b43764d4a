"""Checks, times and tunes the block-sparse attention kernels on one Hopper GPU.

    python -m benchmarks.block_sparse_attention_kernel \
        --out benchmarks/h200/block_sparse_attention_kernel.json

Every output and gradient, that of the log-sum-exp included, is compared with the XLA form in
float64 on fresh random inputs, after filling the memory that outputs are allocated from with NaN.
Then come the times that were asked for, each beside its peer in the same run, and those of other
launch parameters. A case that fails is reported and does not end the run; the script then ends
with an error. The record is written anew after every case, and a short table comes last.

Times are the sum of the kernels of one call, the sorting of lists included (CUPTI, median of 9, or
2 of slow calls), and the wall time of a call with its host work.

`--rehearse` runs the same cases at tiny sizes on a CPU, in the simulator, with times that mean
nothing.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

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

TOLERANCE = {jnp.bfloat16: 1e-2, jnp.float16: 2e-3}
OUTPUTS = ("out", "lse", "dq", "dk", "dv")


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape and its plan; the reference takes `reference_heads` heads, or all."""

    name: str
    plan: Callable[["Case"], BlockPlan]
    T: int
    B: int = 1
    N: int = 16
    K: int = 16
    H: int = 128
    dtype: type = jnp.bfloat16
    config: LaunchConfig | None = None
    reference_heads: int | None = None

    def inputs(self, seed: int) -> tuple[jax.Array, ...]:
        """q, k, v and the gradients of the output and of the log-sum-exp."""
        keys = jax.random.split(jax.random.key(seed), 5)
        arrays = tuple(
            jax.random.normal(key, (self.B, self.T, heads, self.H), self.dtype)
            for key, heads in zip(keys, (self.N, self.K, self.K, self.N), strict=False)
        )
        return *arrays, jax.random.normal(keys[4], (self.B, self.T, self.N))

    def tiny(self) -> "Case":
        """The same in sizes for a simulator."""
        T = 300 if self.T % 1000 == 0 else 256
        N = 2 if self.N > self.K else 1
        return dataclasses.replace(self, T=T, B=1, N=N, K=1, H=64, reference_heads=None)


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
    return sliding_window_plan(
        case.T, case.T // 4, sinks=3, segment_ids=ids, query_block=128, key_block=256
    )


def weighted(case: Case) -> BlockPlan:
    """Random lists, log-weights and rules of each head, some of them empty; small blocks."""
    seed = time.time_ns() % 2**31
    return random_plan(
        case.B, case.T, case.T, case.N, query_block=64, key_block=64, seed=seed
    )


def sparse(case: Case) -> BlockPlan:
    """A tenth of the blocks of each head at random, and its own."""
    m = -(-case.T // 128)
    draw = np.random.default_rng(0).random((1, case.N, m, m)) < 0.1
    return block_mask_plan(jnp.asarray(draw | np.eye(m, dtype=bool)), case.T)


SMALL_STEPS = LaunchConfig(width=64)
CHECKS = [
    Case("causal", causal, T=1024, N=4, K=4),
    Case("window, sinks, documents, grouped, ragged", window, T=3000, B=2, N=8, K=2, H=64),
    Case(
        "random lists, weighted, ragged", weighted, T=1000, B=2, N=4, K=4, H=64,
        dtype=jnp.float16, config=SMALL_STEPS,
    ),
    Case("random lists, weighted, grouped", weighted, T=2048, N=4, K=2, config=SMALL_STEPS),
    Case("causal", causal, T=32768, reference_heads=1),
    Case("a tenth of the blocks", sparse, T=131072, reference_heads=1),
]  # fmt: skip
DENSE, SPARSE = Case("causal", causal, T=131072), Case("a tenth of the blocks", sparse, T=131072)
LONG = Case("causal", causal, T=32768)
VARIANTS = [
    LaunchConfig(),
    LaunchConfig(takes_turns=False),
    LaunchConfig(stages=3),
    LaunchConfig(width=64, stages=2),
    LaunchConfig(width=64, stages=4),
    LaunchConfig(query_gradient_stages=3, key_gradient_stages=3),
    LaunchConfig(query_gradient_stages=4, key_gradient_stages=4),
    LaunchConfig(query_gradient_width=128),
    LaunchConfig(key_gradient_width=128),
]


class Bench:
    """Runs cases, on a GPU or as a rehearsal."""

    def __init__(self, *, rehearse: bool):
        self.rehearse = rehearse

    def sized(self, case: Case) -> Case:
        """The case, or what stands for it in a rehearsal."""
        return case.tiny() if self.rehearse else case

    def ours(self, case: Case) -> Callable:
        """The kernels as a function of q, k, v and a plan; output and log-sum-exp."""

        def run(q, k, v, plan):
            plan = plan.cleared()
            return attend_by_kernel(
                q, k, v, entries(plan), tuple(plan.seen), query_block=plan.query_block,
                key_block=plan.key_block, scale=case.H**-0.5, config=case.config,
                interpret=self.rehearse,
            )  # fmt: skip

        return run

    def cudnn(self, q: jax.Array, k: jax.Array, v: jax.Array, plan: BlockPlan) -> jax.Array:
        """The peer on a causal plan."""
        del plan
        peer = "xla" if self.rehearse else "cudnn"
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=peer)

    def check(self, case: Case) -> dict:
        """Relative errors of every output."""
        *arrays, g, g_lse = case.inputs(seed=time.time_ns() % 2**31)
        plan = case.plan(case)
        run = jax.jit(_with_gradients(self.ours(case))).lower(*arrays, plan, g, g_lse).compile()
        kernels.poison()
        heads = slice(case.reference_heads)
        got = [np.asarray(x[:, :, heads], np.float64) for x in run(*arrays, plan, g, g_lse)]
        plan = jax.tree.map(lambda x: x[:, heads] if x.shape[1] == case.N else x, plan)
        reference = functools.partial(
            block_sparse_attention, return_lse=True, implementation="xla"
        )
        with jax.enable_x64(True):
            wide = [x[:, :, heads].astype(jnp.float64) for x in arrays]
            gradients = [x[:, :, heads].astype(jnp.float64) for x in (g, g_lse)]
            want = jax.jit(_with_gradients(reference))(*wide, plan, *gradients)
        errors = {
            name: float(np.linalg.norm(a - b) / np.linalg.norm(b))
            for name, a, b in zip(OUTPUTS, got, map(np.asarray, want), strict=True)
        }
        # A NaN is not below the tolerance either.
        passed = all(error <= TOLERANCE[case.dtype] for error in errors.values())
        return {"errors": errors, "passed": passed}

    def time(self, case: Case, form: Callable, *, backward: bool) -> dict:
        """Times of a form of q, k, v and a plan."""
        *arrays, g, g_lse = case.inputs(seed=0)
        arguments = [*arrays, case.plan(case)]
        if backward:
            form, arguments = _with_gradients(form), [*arguments, g, g_lse]
        compiled = jax.jit(form).lower(*arguments).compile()
        if not self.rehearse:
            return kernels.times(compiled, *arguments)
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        return {"kernel_ms": 1e3 * (time.perf_counter() - start)}


def _with_gradients(form: Callable) -> Callable:
    """All outputs and gradients, as one function of q, k, v, the plan, g and the gradient of l."""

    def run(q, k, v, plan, g, g_lse):
        out, pull = jax.vjp(lambda q, k, v: form(q, k, v, plan), q, k, v)
        if not isinstance(out, tuple):
            return out, *pull(g)
        empty = jnp.isneginf(out[1])
        return out[0], jnp.where(empty, 0, out[1]), *pull((g, g_lse.astype(out[1].dtype)))

    return run


def rows(bench: Bench, only: str) -> Iterator[tuple[dict, Callable[[], dict]]]:
    """What to run: a description, and what gives its figures."""

    def timed(peers, case, name, form, backward):
        about = {"kind": "time", "peers": peers, "form": name, "case": case.name, "T": case.T}
        form = form or bench.ours(case)
        about["pass"] = "f+b" if backward else "f"
        return about, lambda: bench.time(case, form, backward=backward)

    for case in map(bench.sized, CHECKS) if only in ("all", "checks") else ():
        sizes = f"B={case.B} T={case.T} N={case.N} K={case.K} H={case.H} {np.dtype(case.dtype)}"
        about = {"kind": "check", "case": case.name, "sizes": sizes}
        yield about, functools.partial(bench.check, case)
    long = bench.sized(LONG)
    if only in ("all", "causal"):
        for backward in (False, True):
            yield timed("causal", long, "mosaic_gpu", None, backward)
            yield timed("causal", long, "cudnn", bench.cudnn, backward)
    if only in ("all", "sparse"):
        for name, case in (("sparse", SPARSE), ("dense", DENSE)):
            yield timed("sparse", bench.sized(case), name, None, False)
    if only in ("all", "tuning"):
        for config in VARIANTS:
            case = dataclasses.replace(long, config=config)
            changes = {
                k: v for k, v in dataclasses.asdict(config).items()
                if v != getattr(LaunchConfig(), k)
            }  # fmt: skip
            name = ", ".join(f"{k}={v}" for k, v in changes.items()) or "defaults"
            yield timed("tuning", case, name, None, True)


def summary(results: list[dict]) -> list[str]:
    """The short table: what was asked for, what was reached."""

    def ms(peers, form, which):
        found = [
            r["kernel_ms"] for r in results
            if (r.get("peers"), r.get("form"), r.get("pass")) == (peers, form, which)
            and "kernel_ms" in r
        ]  # fmt: skip
        return found[0] if found else math.nan

    checks = [r for r in results if r["kind"] == "check"]
    lines = [f"checks: {sum(bool(r.get('passed')) for r in checks)} of {len(checks)} passed"]
    for which, goal in (("f", 0.95), ("f+b", 0.85)):
        ours, peer = (ms("causal", form, which) for form in ("mosaic_gpu", "cudnn"))
        lines.append(
            f"causal 1x32768 {which}: {ours:.2f} ms, cudnn {peer:.2f} ms: "
            f"{peer / ours:.2f}x its speed (to reach: {goal}x)"
        )
    few, all_ = ms("sparse", "sparse", "f"), ms("sparse", "dense", "f")
    lines.append(
        f"a tenth of 1x131072 f: {few:.2f} ms, dense {all_:.2f} ms: "
        f"{all_ / few:.2f}x faster (to reach: 8x)"
    )
    tuned = [r for r in results if r.get("peers") == "tuning" and "kernel_ms" in r]
    for r in sorted(tuned, key=lambda r: r["kernel_ms"]):
        longest = ", ".join(
            f"{k['name'].removeprefix('block_sparse_attention_')[:15]} {k['ms']:.2f}"
            for k in r.get("kernels", ())[:3]
        )
        lines.append(f"{r['kernel_ms']:.2f} ms f+b with {r['form']} ({longest})")
    return lines


def main() -> int:
    """Runs all, or the asked part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file, written anew after every case")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no case after that")
    parser.add_argument("--only", default="all", choices=("all", "checks", "causal", "sparse", "tuning"))
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU")
    arguments = parser.parse_args()
    start, results, failed = time.perf_counter(), [], False
    for about, run in rows(Bench(rehearse=arguments.rehearse), arguments.only):
        if time.perf_counter() - start > arguments.seconds:
            break
        try:
            figures = run()
        except Exception as error:  # the other cases still tell something
            figures = {"error": f"{type(error).__name__}: {error}"[:400]}
        failed |= "error" in figures or not figures.get("passed", True)
        results.append(about | figures)
        print(json.dumps({k: v for k, v in results[-1].items() if k != "kernels"}), flush=True)
        record = {
            "device": jax.devices()[0].device_kind, "jax": jax.__version__,
            "command": "python -m benchmarks.block_sparse_attention_kernel "
            + shlex.join(sys.argv[1:]),
            "rows": results, "summary": summary(results),
        }  # fmt: skip
        if arguments.out:
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(summary(results)), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
