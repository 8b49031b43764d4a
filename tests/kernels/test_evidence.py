"""What a kernel claims to have been tried on, it has been tried on."""

import importlib
import pkgutil
from pathlib import Path

import pytest

import pallas_kernels

ROOT = Path(__file__).parents[2]
KERNELS = [module.name for module in pkgutil.iter_modules(pallas_kernels.__path__) if module.ispkg]


def proofs(kernel, backend):
    """Every claim that kernels for a backend can make, and whether something bears it out."""
    tests = Path(__file__).with_name(f"test_{kernel}_{backend}.py").read_text()
    records = ROOT / "benchmarks"
    if backend == "mosaic_gpu":
        return {
            "interpreted": "interpret=" in tests,
            "lowered for CUDA": 'lowering_platforms=("cuda",)' in tests,
            "run on an H200": (records / "h200" / f"{kernel}_kernel.json").exists(),
        }
    return {
        "simulated": "interpret=" in tests,
        "lowered for TPU": 'lowering_platforms=("tpu",)' in tests,
        "compiled for v5e, v6e and v5p": (
            "compiled_for_tpu.check(" in tests and (records / "tpu" / f"{kernel}.json").exists()
        ),
    }


@pytest.mark.parametrize("kernel", KERNELS)
def test_claims(kernel):
    module = importlib.import_module(f"pallas_kernels.{kernel}")
    backends = {path.stem for path in Path(module.__path__[0]).glob("mosaic_*.py")}
    assert set(module.EVIDENCE) == backends
    for backend, claims in module.EVIDENCE.items():
        proven = [claim for claim, proof in proofs(kernel, backend).items() if proof]
        assert sorted(claims) == sorted(proven)
