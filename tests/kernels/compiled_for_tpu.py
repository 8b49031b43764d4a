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
"""Bytes that a kernel may take on the smallest of the chips, if it does not ask for more."""


def check(kernel: str, vmem: int = VMEM) -> None:
    """Compiles some of the kernel's recorded shapes for every TPU, and compares with the record."""
    library = tpu.library()
    if library is None:
        pytest.skip("libtpu is not installed; `make test` installs it")
    command = [sys.executable, "-m", "benchmarks.tpu", kernel, "--in_tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(done.stdout)["rows"]
    for row in rows:
        assert set(row["chips"]) == {"v5e", "v6e", "v5p"}
        for taken in row["chips"].values():
            assert len(taken["vmem_bytes"]) >= 2
            assert max(taken["vmem_bytes"].values()) <= vmem
    record = json.loads((ROOT / "benchmarks" / "tpu" / f"{kernel}.json").read_text())
    if (record["jax"], record["libtpu"]) == (jax.__version__, tpu.version(library)):
        recorded = {row["case"]: row["chips"] for row in record["rows"]}
        found = {row["case"]: row["chips"] for row in rows}
        remedy = f"run: python -m benchmarks.tpu {kernel} --out benchmarks/tpu"
        for case, chips in found.items():
            for chip, taken in chips.items():
                expected = recorded[case][chip]
                assert taken["vmem_bytes"] == expected["vmem_bytes"], remedy
                assert taken["temp_bytes"] == _nearly(expected["temp_bytes"]), remedy


def _nearly(size: int):
    """Where XLA lays temporaries out, around the kernels, varies by tens of kilobytes."""
    return pytest.approx(size, rel=0.05, abs=2**18)
