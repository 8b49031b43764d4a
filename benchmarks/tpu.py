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
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels.linear_attention import mosaic_tpu as linear

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


class Case(Protocol):
    """One shape; a dataclass."""

    @property
    def name(self) -> str:
        """As the table spells it."""
        ...

    def arrays(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What is differentiated, the output's gradient last."""
        ...

    def run(self, *arrays: jax.Array) -> jax.Array:
        """The kernels' output."""
        ...


@dataclasses.dataclass(frozen=True)
class LinearAttention:
    """A call of linear attention in bfloat16."""

    feature_map: str
    B: int
    T: int
    N: int
    K: int
    F: int
    H: int
    normalize: bool
    packed: bool = False

    @property
    def name(self):
        """As the table spells it."""
        kind = "normalised" if self.normalize else "plain"
        return (
            f"{self.feature_map} {kind}{' packed' if self.packed else ''} B={self.B} T={self.T}"
            f" N={self.N} K={self.K} F={self.F} H={self.H}"
        )

    def arrays(self):
        """q, k, v and the output's gradient."""
        return _heads(self.B, self.T, (self.N, self.F), (self.K, self.F), (self.K, self.H),
                      (self.N, self.H))  # fmt: skip

    def run(self, q, k, v):
        """The output."""
        documents = jnp.zeros((self.B, self.T), jnp.int32) if self.packed else None
        return linear.linear_attention(
            q, k, v, None, documents, feature_map=self.feature_map, scale=self.F**-0.5,
            normalize=self.normalize,
        )[0]  # fmt: skip


_TAYLOR = functools.partial(LinearAttention, "taylor", normalize=True)
_IDENTITY = functools.partial(LinearAttention, "identity", normalize=False)
CASES: dict[str, list[Case]] = {
    "linear_attention": [
        _TAYLOR(B=1, T=32768, N=16, K=16, F=16, H=64),
        _TAYLOR(B=2, T=1000, N=8, K=2, F=32, H=128, packed=True),
        _IDENTITY(B=1, T=32768, N=16, K=16, F=128, H=128),
    ],
}


def _heads(B: int, T: int, *heads: tuple[int, int]) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct((B, T, *sizes), jnp.bfloat16) for sizes in heads)


def compiled(f: Callable, arrays: tuple[jax.ShapeDtypeStruct, ...], chip: str) -> Any:
    """`f`, compiled for one device of a kind of TPU."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices[0]
    here = SingleDeviceSharding(device)
    placed = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for x in arrays)
    return jax.jit(f).lower(*placed).compile()


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

    def gradients(*arrays_and_g):
        *arrays, g = arrays_and_g
        out, pull = jax.vjp(case.run, *arrays)
        return out, *pull(g)

    arrays = case.arrays()
    return (
        {"case": case.name}
        | dataclasses.asdict(case)
        | {  # pyrefly: ignore
            "argument_bytes": sum(x.size * x.dtype.itemsize for x in arrays),
            "chips": {chip: memory(compiled(gradients, arrays, chip)) for chip in CHIPS},
        }
    )


def version(library: str) -> str:
    """The compiler's version."""
    folder = str(Path(library).parents[1])
    (found,) = importlib.metadata.distributions(name="libtpu", path=[folder])
    return found.version


def main(arguments: list[str]) -> None:
    """Compiles a kernel's shapes, and writes or prints the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernel", choices=CASES)
    parser.add_argument("--out", type=Path, help="folder of the records; default: print")
    options = parser.parse_args(arguments)
    path = library()
    if path is None:
        parser.error("libtpu is not installed; `make test` installs it")
    prepare(path)
    text = json.dumps(
        {
            "script": "tpu",
            "jax": jax.__version__,
            "libtpu": version(path),
            "command": "python -m benchmarks.tpu " + shlex.join(arguments),
            "rows": [record(case) for case in CASES[options.kernel]],
        },
        indent=1,
    )
    if options.out is None:
        print(text)
    else:
        options.out.mkdir(exist_ok=True)
        (options.out / f"{options.kernel}.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
