"""Checks and times the mechanisms that run on block-sparse attention on one Hopper GPU.

    python -m benchmarks.sparse_mechanisms --out benchmarks/h200/sparse_mechanisms.json

Each mechanism's form by plans of blocks is compared with its own XLA form, at a smaller length, in
values and all gradients: the inputs are the same bfloat16 numbers, the XLA form computes in
float32. Then both are timed at full length, beside exact attention by cuDNN, with the longest
kernels of each call: sorting, gathering and the building of plans are kernels too. A case that
fails is reported and does not end the run.

Times are the sum of the kernels of one call (CUPTI, median of 9, or 2 of slow calls and of peers),
and the wall time of a call with its host work. Programs are compiled side by side before anything
is timed.

`--rehearse` runs all of it at tiny sizes on a CPU, in plain XLA; its times mean nothing.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

if "--rehearse" in sys.argv:
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernels
from lcattn import ops

TOLERANCE = 2e-2
PASSES = {"forward": False, "forward_backward": True}
Form = Callable[..., jax.Array]
Programs = Mapping[tuple[str, str], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A mechanism and a shape.

    Attributes:
      op: its name in `lcattn.ops`.
      options: of the call.
      documents: as many of about one length are packed into the row; None for no segment_ids.
      T, N, H: tokens, heads and their size.
      goal: milliseconds to reach, forward, and forward and backward; None for none.
      times_exact: or how many times faster than cuDNN to be instead.
      short: the length that is checked; None for a mechanism that is checked already.
      peers: what is timed beside it, of "cudnn_exact" and "xla", which takes long.
    """

    op: str
    options: Mapping[str, Any]
    T: int
    N: int
    H: int
    documents: int | None = None
    goal: tuple[float | None, float | None] = (None, None)
    times_exact: tuple[float | None, float | None] = (None, None)
    short: int | None = 16384
    peers: tuple[str, ...] = ("cudnn_exact",)

    @property
    def name(self) -> str:
        """As tables spell it."""
        options = dict(self.options)
        if self.documents is not None:
            options["documents"] = self.documents
        options |= {"T": self.T, "N": self.N, "H": self.H}
        return " ".join([self.op, *(f"{k}={v}" for k, v in options.items())])

    @property
    def is_causal(self) -> bool:
        """Whether queries read the past only."""
        return self.options.get("causal", True)

    def inputs(self, T: int, seed: int, dtype=jnp.bfloat16) -> tuple[jax.Array, ...]:
        """q, k, v and the gradient of the output; q and v for routing, which has no keys."""
        keys = jax.random.split(jax.random.key(seed), 4)
        q, k, v, g = (jax.random.normal(key, (1, T, self.N, self.H), dtype) for key in keys)
        return (q, v, g) if self.op == "routing_attention" else (q, k, v, g)

    def form(self, implementation: str) -> Form:
        """The mechanism, as a function of its inputs."""
        call = functools.partial(
            getattr(ops, self.op), **self.options, implementation=implementation
        )
        if self.documents is not None:
            return functools.partial(_packed, call, self.documents)
        if self.op == "hyper_attention":
            return functools.partial(call, rng=jax.random.key(1))
        if self.op == "routing_attention":
            return functools.partial(_routed, call, self.options["cluster_size"])
        return call

    def exact(self, q: jax.Array, *rest: jax.Array) -> jax.Array:
        """Softmax attention by cuDNN; queries are the keys of routing."""
        k, v = (q, *rest) if len(rest) == 1 else rest
        peer = "xla" if is_rehearsal() else "cudnn"
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=self.is_causal, implementation=peer
        )  # fmt: skip

    def forms(self) -> dict[str, Form]:
        """What is timed."""
        forms = {"cudnn_exact": self.exact, "xla": self.form("xla")}
        return {"block_sparse": self.form("block_sparse")} | {k: forms[k] for k in self.peers}

    def passes(self, form: str) -> dict[str, bool]:
        """The passes that are timed of a form, and whether they go backward."""
        return {"forward_backward": True} if form == "xla" else PASSES

    def errors(self, run: Programs) -> dict[str, float]:
        """Relative RMS errors of the output and all gradients against the XLA form."""
        if self.short is None:
            return {}
        arrays = self.inputs(self.short, seed=time.time_ns() % 2**31)
        if not is_rehearsal():
            kernels.poison()
        got = run["check", "block_sparse"](*arrays)
        want = run["check", "xla"](*(x.astype(jnp.float32) for x in arrays))
        names = ("out", "dq", "dv") if len(arrays) == 3 else ("out", "dq", "dk", "dv")
        found = {}
        for name, a, b in zip(names, got, want, strict=True):
            a, b = (np.asarray(x, np.float64) for x in (a, b))
            found[name] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
        return found

    def tiny(self) -> "Case":
        """The same in sizes for a CPU."""
        options = dict(self.options)
        for name, size in (("min_seq_len", 64), ("block_size", 16), ("sample_size", 16)):
            if self.op == "hyper_attention":
                options[name] = size
        for name, size in (("cluster_size", 16), ("window", 64)):
            if name in options:
                options[name] = size
        return dataclasses.replace(self, options=options, T=512, short=self.short and 256, N=2)


def is_rehearsal() -> bool:
    """Whether this is a rehearsal."""
    return jax.default_backend() == "cpu"


def _routed(call: Form, size: int, q: jax.Array, v: jax.Array) -> jax.Array:
    """With as many random centroids as make clusters of the size of lists."""
    count = max(q.shape[1] // size, 1)
    centroids = jax.random.normal(jax.random.key(2), (q.shape[2], count, q.shape[3]))
    return call(q, v, centroids)


def _packed(call: Form, documents: int, q: jax.Array, *rest: jax.Array) -> jax.Array:
    """With documents that do not end where blocks do."""
    ids = jnp.arange(q.shape[1]) * documents // q.shape[1]
    return call(q, *rest, segment_ids=jnp.broadcast_to(ids, q.shape[:2]))


def compiled(form: Form, arrays: tuple[jax.Array, ...], *, backward: bool):
    """A form, or its values and gradients, compiled for shapes."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    if backward:
        return jax.jit(kernels.gradients(form)).lower(*shapes).compile()
    return jax.jit(form).lower(*shapes[:-1]).compile()


def programs(case: Case) -> dict[tuple[str, str], Callable[..., Any]]:
    """How to compile everything that a case runs."""
    arrays = jax.eval_shape(lambda: case.inputs(case.T, 0))
    work: dict[tuple[str, str], Callable[..., Any]] = {
        (name, which): functools.partial(compiled, form, arrays, backward=backward)
        for name, form in case.forms().items()
        for which, backward in case.passes(name).items()
    }
    for name, dtype in (("block_sparse", jnp.bfloat16), ("xla", jnp.float32)):
        if case.short is None:
            break
        short = jax.eval_shape(lambda dtype=dtype: case.inputs(case.short, 0, dtype))
        work["check", name] = functools.partial(
            compiled, case.form(name), short, backward=True
        )  # fmt: skip
    return work


def times(run: Any, arrays: tuple[jax.Array, ...], *, quick: bool) -> dict[str, Any]:
    """Times of a program, as `kernels.times` gives them."""
    if not is_rehearsal():
        return kernels.times(run, *arrays, quick=quick)
    start = time.perf_counter()
    jax.block_until_ready(run(*arrays))
    milliseconds = 1e3 * (time.perf_counter() - start)
    return {"kernels": [], "kernel_ms": milliseconds, "call_ms": milliseconds}


def measure(case: Case, run: Programs) -> dict[str, Any]:
    """One row of the record."""
    errors = case.errors(run)
    # A NaN is not below the tolerance either.
    passed = all(error <= TOLERANCE for error in errors.values())
    row: dict[str, Any] = {"case": case.name, "errors": errors, "passed": passed}
    arrays = case.inputs(case.T, seed=0)
    for name in case.forms():
        try:
            row[name] = {
                which: times(
                    run[name, which], arrays if backward else arrays[:-1], quick=name in case.peers
                )
                for which, backward in case.passes(name).items()
            }
        except jax.errors.JaxRuntimeError as error:
            if name not in case.peers:
                raise
            print(f"{case.name}, {name}: {str(error)[:200]}", flush=True)  # too much memory, say
    return row


def summary(case: Case, row: dict[str, Any]) -> list[str]:
    """What was asked for, what was reached, and what took long."""
    errors = " ".join(f"{k} {v:.1e}" for k, v in row["errors"].items())
    lines = [f"{case.name}: {'right' if row['passed'] else 'WRONG'}, {errors}"]
    for which, goal, times_exact in zip(PASSES, case.goal, case.times_exact, strict=True):
        ours = row["block_sparse"][which]
        line = f"  {which}: {ours['kernel_ms']:.2f} ms (call {ours['call_ms']:.2f})"
        for peer in case.peers:
            if which in row.get(peer, {}):
                ms = row[peer][which]["kernel_ms"]
                line += f", {peer} {ms:.2f}: {ms / ours['kernel_ms']:.2f}x"
        asked = f"{goal} ms" if goal else f"{times_exact}x" if times_exact else "–"
        lines.append(f"{line}; to reach: {asked}")
        lines += [f"    {kernel['ms']:8.3f} {kernel['name']}" for kernel in ours["kernels"]]
    return lines


HYPER: dict[str, Any] = {"op": "hyper_attention", "N": 32, "H": 64}
CORES: dict[str, Any] = {
    "op": "core_context_attention", "options": {"group_size": 16, "window": 1024}, "N": 16, "H": 128
}  # fmt: skip
ROUTING: dict[str, Any] = {
    "op": "routing_attention", "options": {"cluster_size": 256}, "N": 16, "H": 64
}  # fmt: skip
WINDOW: dict[str, Any] = {
    "op": "softmax_attention", "options": {"window": 1024, "sinks": 4}, "N": 16, "H": 128
}  # fmt: skip
PACKED: dict[str, Any] = {
    "op": "softmax_attention", "options": {}, "documents": 13, "N": 16, "H": 128
}  # fmt: skip
CASES = {
    "hyper": Case(
        **HYPER, options={"causal": True}, T=131072, goal=(20, 60), peers=("cudnn_exact", "xla")
    ),
    "hyper_all": Case(
        **HYPER, options={"causal": False, "strict": False}, T=131072, goal=(5, 15), peers=(),
    ),
    "hyper_16384": Case(**HYPER, options={"causal": True}, T=16384, times_exact=(1, 1), short=None),
    "cores": Case(
        **CORES, T=131072, times_exact=(8, None), short=8192, peers=("cudnn_exact", "xla")
    ),
    "routing": Case(
        **ROUTING, T=65536, times_exact=(None, 6), short=8192, peers=("cudnn_exact", "xla")
    ),
    "window": Case(**WINDOW, T=131072, short=8192, peers=("xla",)),
    "packed": Case(**PACKED, T=32768, short=8192, peers=("xla",)),
    # From which length on a plan is the better choice.
    "cores_4096": Case(**CORES, T=4096, short=None, peers=("xla",)),
    "routing_4096": Case(**ROUTING, T=4096, short=None, peers=("xla",)),
    "window_4096": Case(**WINDOW, T=4096, short=None, peers=("xla",)),
    "packed_4096": Case(**PACKED, T=4096, short=None, peers=("xla",)),
}  # fmt: skip


def main() -> int:
    """Measures every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file, written anew after every case")
    parser.add_argument("--only", nargs="*", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU")
    arguments = parser.parse_args()
    cases = {name: CASES[name] for name in arguments.only}
    if arguments.rehearse:
        cases = {name: case.tiny() for name, case in cases.items()}
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(1 if arguments.rehearse else 12) as pool:
        futures = {
            name: {key: pool.submit(work) for key, work in programs(case).items()}
            for name, case in cases.items()
        }
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    for name, case in cases.items():
        try:
            row = measure(case, {key: future.result() for key, future in futures[name].items()})
        except Exception as error:  # the other cases still tell something
            failed.append(f"{name}: {type(error).__name__}: {error}"[:600])
            print(failed[-1], flush=True)
        else:
            rows.append(row)
            print("\n".join(summary(case, row)), flush=True)
        kernels.save(arguments.out, "sparse_mechanisms", rows=rows, failed=failed)
    return int(bool(failed) or not all(row["passed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
