"""What a kernel claims to have been tried on, it has been tried on."""

import importlib
import pkgutil
from pathlib import Path

import pytest

import pallas_kernels

ROOT = Path(__file__).parents[2]
KERNELS = [module.name for module in pkgutil.iter_modules(pallas_kernels.__path__) if module.ispkg]


@pytest.mark.parametrize("kernel", KERNELS)
def test_claims(kernel):
    claims = importlib.import_module(f"pallas_kernels.{kernel}").EVIDENCE
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob(f"test_{kernel}_*.py"))
    record = ROOT / "benchmarks" / "h200" / f"{kernel}_kernel.json"
    proofs = {
        "interpreted": "interpret=" in tests,
        "lowered for CUDA": 'lowering_platforms=("cuda",)' in tests,
        "run on an H200": record.exists(),
    }
    assert [claim for claim in claims if not proofs[claim]] == []
    assert [claim for claim, proven in proofs.items() if proven and claim not in claims] == []
