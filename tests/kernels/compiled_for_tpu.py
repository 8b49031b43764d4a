"""Compiles TPU kernels in a process of their own: there the compiler looks for no TPU.

What would crash it does not end the tests, and its options are not theirs.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import tpu

ROOT = Path(__file__).parents[2]

VMEM = 16 * 2**20
"""Bytes that a kernel may take on the smallest of the chips."""


def check(kernel: str) -> None:
    """Compiles the kernel's recorded shapes for every TPU, and compares memory with the record."""
    library = tpu.library()
    if library is None:
        pytest.skip("libtpu is not installed; `make test` installs it")
    command = [sys.executable, "-m", "benchmarks.tpu", kernel]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(done.stdout)["rows"]
    for row in rows:
        assert set(row["chips"]) == {"v5e", "v6e", "v5p"}
        for taken in row["chips"].values():
            own = {name: size for name, size in taken["vmem_bytes"].items() if kernel in name}
            assert len(own) >= 3
            assert max(own.values()) <= VMEM
    record = json.loads((ROOT / "benchmarks" / "tpu" / f"{kernel}.json").read_text())
    if (record["jax"], record["libtpu"]) == (jax.__version__, tpu.version(library)):
        assert rows == record["rows"], (
            f"run: python -m benchmarks.tpu {kernel} --out benchmarks/tpu"
        )
