"""Compiles TPU kernels ahead of time, for chips that need not be there, and records their memory.

    python -m benchmarks.tpu linear_attention --out benchmarks/tpu

`libtpu`, the compiler, knows the chips; `make test` installs it beside the virtual environment,
where only this program finds it. Compiling shows what simulators cannot: tiles that a chip does not
have, operations that it lacks, and memory. Nothing runs, so nothing is timed.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcattn import ops
from pallas_kernels import source

CHIPS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}
"""The smallest system of each kind of TPU."""

INSTALLED = Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so"
"""Where `make test` installs the compiler. Where JAX could import it, it would look for a TPU."""


def library() -> str | None:
    """The compiler's file, or None if there is none."""
    if "TPU_LIBRARY_PATH" in os.environ:
        return os.environ["TPU_LIBRARY_PATH"]
    if INSTALLED.exists():
        return str(INSTALLED)
    spec = importlib.util.find_spec("libtpu")
    return None if spec is None else str(Path(str(spec.origin)).with_name("libtpu.so"))


def prepare(library: str) -> None:
    """Sets this process up for compiling only; before JAX is used."""
    os.environ |= {
        "TPU_LIBRARY_PATH": library,
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at once
        # No questions to the network about a TPU that is not there.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        "XLA_FLAGS": "",  # those of the tests are for CPUs
    }
    jax.config.update("jax_platforms", "cpu")
    # A program for an absent chip cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call of an op in bfloat16.

    Attributes:
      op: its name in `lcattn.ops`.
      options: its options.
      packed: whether it is given segment ids.
      sharded: whether the batch is split over four chips, by `shard_map`.
      in_tests: whether the tests compile it too. Others take longer, though their kernels differ
        in the length of the walk only.
      plan: name of the plan of blocks that it is given, one of `PLANS`.
      kernels: the op whose kernels it runs, by a plan of its own; None: it has kernels itself.
      seeded: whether it is given a key.
      hidden: inner sizes of the network that a neural memory starts with; it has K memories.
      decay: what log decays are of: each "channel" or "head" of the K states; None: there are none.
    """

    op: str
    B: int = 1
    T: int = 32768
    N: int = 16
    K: int = 16
    F: int
    H: int
    options: Mapping[str, Any]
    packed: bool = False
    sharded: bool = False
    in_tests: bool = False
    plan: str | None = None
    kernels: str | None = None
    seeded: bool = False
    hidden: tuple[int, ...] = ()
    decay: Literal["channel", "head"] | None = None

    @property
    def kernel_op(self) -> str:
        """The op whose kernels it runs, and whose record it is in."""
        return self.kernels or self.op

    @property
    def name(self) -> str:
        """As the table spells it."""
        options = " ".join(f"{name}={value}" for name, value in self.options.items())
        options += "".join(f" hidden={size}" for size in self.hidden)
        options += f"decay={self.decay}" if self.decay else ""
        sizes = " ".join(f"{name}={getattr(self, name)}" for name in "BTNKFH")
        how = "".join(f" {word}" for word in ("packed", "sharded") if getattr(self, word))
        what = self.op if self.kernels else self.plan
        return " ".join(filter(None, [what, options])) + f"{how} {sizes}"

    def arrays(self) -> tuple[Any, ...]:
        """The output's gradient, q, k, v, and what else the op takes."""
        heads = (self.N, self.H), (self.N, self.F), (self.K, self.F), (self.K, self.H)
        shape = self.B, self.T
        given = tuple(jax.ShapeDtypeStruct((*shape, *x), jnp.bfloat16) for x in heads)
        if self.decay is not None:
            each = (self.F,) if self.decay == "channel" else ()
            return *given, jax.ShapeDtypeStruct((*shape, self.K, *each), jnp.float32)
        if self.op != "neural_memory":
            return given
        gate = jax.ShapeDtypeStruct((*shape, self.K), jnp.float32)
        network = [
            jax.ShapeDtypeStruct((self.K, *sizes), jnp.float32)
            for sizes in itertools.pairwise((self.F, *self.hidden, self.H))
        ]
        return *given, gate, gate, gate, network

    def gradients(self, g: jax.Array, *arrays: Any):
        """The output and the gradients of all arrays."""
        implementation = "block_sparse" if self.kernels else "mosaic_tpu"
        options = {**self.options, "implementation": implementation}
        if self.seeded:
            options["rng"] = jax.random.key(0)
        if self.packed:
            options["segment_ids"] = jnp.zeros(g.shape[:2], jnp.int32)
        if self.plan is not None:
            options["plan"] = PLANS[self.plan](self)
        attend = functools.partial(getattr(ops, self.op), **options)
        out, pull = jax.vjp(attend, *arrays)
        return out, *pull(g)


def _best_blocks(case: Case) -> ops.BlockPlan:
    """Lists of each key head, of a tenth of the blocks."""
    count = case.T // 512
    scores = jnp.zeros((case.B, case.K, count, count))
    return ops.top_blocks_plan(scores, count // 10, case.T, query_block=512, key_block=512)


PLANS = {
    "causal": lambda case: ops.causal_plan(case.T, query_block=512, key_block=512),
    "window of 4096, 4 sinks": lambda case: ops.sliding_window_plan(case.T, 4096, sinks=4),
    "a tenth of the blocks": _best_blocks,
}
"""Plans of blocks, made in the program."""

_TAYLOR = functools.partial(Case, op="linear_attention", options={"feature_map": "taylor"})
_IDENTITY = functools.partial(Case, op="linear_attention", options={"feature_map": "identity"})
_GATED = functools.partial(Case, op="gated_linear_attention", options={})
_BLOCKS = functools.partial(Case, op="block_sparse_attention", options={})
_MEMORY = functools.partial(Case, op="neural_memory", options={"chunk_size": 64})
_LSSA = functools.partial(Case, op="softplus_attention", options={"power": None})
_LSSAR = functools.partial(Case, op="softplus_attention", options={"power": 15.0})
_BY_PLAN = functools.partial(Case, T=131072, kernels="block_sparse_attention")
CASES = [
    _BLOCKS(plan="causal", F=128, H=128),
    _BLOCKS(plan="window of 4096, 4 sinks", T=16000, K=4, F=64, H=64),
    _BLOCKS(plan="a tenth of the blocks", T=131072, K=4, F=128, H=128),
    _BLOCKS(plan="window of 4096, 4 sinks", B=2, T=1000, N=8, K=2, F=64, H=128, in_tests=True),
    _BY_PLAN(op="hyper_attention", F=64, H=64, options={}, seeded=True),
    _BY_PLAN(op="core_context_attention", F=128, H=128, options={"group_size": 16, "window": 1024}),
    _GATED(F=128, H=128, decay="channel"),
    _GATED(F=128, H=128, decay="head"),
    _GATED(T=131072, K=4, F=64, H=128, decay="channel"),
    _GATED(
        B=4,
        T=1000,
        N=8,
        K=2,
        F=64,
        H=128,
        decay="channel",
        packed=True,
        sharded=True,
        in_tests=True,
    ),
    _GATED(T=500, N=2, K=2, F=64, H=64, decay="head", in_tests=True),
    _MEMORY(B=4, T=8192, N=4, K=4, F=64, H=64, hidden=(256,)),
    _MEMORY(T=8192, N=8, K=8, F=128, H=128, hidden=(512,)),
    _MEMORY(F=128, H=128),
    _MEMORY(T=500, N=2, K=1, F=64, H=64, hidden=(128,), packed=True, in_tests=True),
    _TAYLOR(F=16, H=64, in_tests=True),
    _TAYLOR(B=4, T=1000, N=8, K=2, F=16, H=128, packed=True, sharded=True, in_tests=True),
    _TAYLOR(F=32, H=64),
    _IDENTITY(F=128, H=128),
    _LSSAR(F=128, H=128),
    _LSSAR(T=131072, F=128, H=128),
    _LSSA(F=64, H=64),
    _LSSAR(B=2, T=500, N=8, K=2, F=64, H=64, packed=True, in_tests=True),
    _LSSA(T=500, N=8, K=8, F=128, H=128, in_tests=True),
]


def compiled(case: Case, chip: str) -> Any:
    """The case's gradients, compiled for a kind of TPU."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices
    run = case.gradients
    mesh = Mesh(np.array(devices if case.sharded else devices[:1]), ("data",))
    if case.sharded:
        split = PartitionSpec("data")
        run = jax.shard_map(run, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    here = NamedSharding(mesh, PartitionSpec("data"))
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), case.arrays()
    )
    with jax.default_device(devices[0]):  # what ops look at
        return jax.jit(run).lower(*placed).compile()


def memory(program: Any) -> dict[str, Any]:
    """Bytes of HBM besides inputs and outputs, and bytes of VMEM of each kernel."""
    calls = re.findall(
        r'%(?:transpose_)?(?:jvp_)?([a-z_]+?)_*[.\d]* = .*?"tpu_custom_call"'
        r'.*?"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"',
        program.as_text(),
    )
    return {
        "temp_bytes": program.memory_analysis().temp_size_in_bytes,
        "vmem_bytes": {name: int(size) for name, size in calls},
    }


def record(case: Case) -> dict[str, Any]:
    """What one shape takes, forward and backward in one program, on every chip."""
    return {
        "case": case.name,
        "argument_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(case.arrays())),
        "chips": {chip: memory(compiled(case, chip)) for chip in CHIPS},
    }


def version(library: str) -> str:
    """The compiler's version."""
    folder = str(Path(library).parents[1])
    found = importlib.metadata.distributions(name="libtpu", path=[folder])
    return next((distribution.version for distribution in found), "unknown")


def main(arguments: list[str]) -> None:
    """Compiles an op's shapes, and writes or prints the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=sorted({case.kernel_op for case in CASES}))
    parser.add_argument("--in_tests", action="store_true", help="only what the tests compile")
    parser.add_argument("--out", type=Path, help="folder of the records; default: print")
    options = parser.parse_args(arguments)
    path = library()
    if path is None:
        parser.error("libtpu is not installed; `make test` installs it")
    prepare(path)
    cases = [case for case in CASES if case.kernel_op == options.op]
    if options.in_tests:
        cases = [case for case in cases if case.in_tests]
    text = json.dumps(
        {
            "script": "tpu",
            "jax": jax.__version__,
            "libtpu": version(path),
            "command": "python -m benchmarks.tpu " + shlex.join(arguments),
            "digests": {options.op: source.digest(options.op, "mosaic_tpu")},
            "rows": [record(case) for case in cases],
        },
        indent=1,
    )
    if options.out is None:
        print(text)
    else:
        options.out.mkdir(exist_ok=True)
        (options.out / f"{options.op}.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
