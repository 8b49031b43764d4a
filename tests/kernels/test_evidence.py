"""What a kernel claims to have been tried on, it has been tried on; records say of which code."""

import importlib
import pkgutil
from pathlib import Path

import pytest

import pallas_kernels
from experiments import readme, records
from pallas_kernels import source

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


PACKAGE = {
    "shared.py": "SIZE = 64",
    "unused.py": "SIZE = 64",
    "toy/__init__.py": "EVIDENCE = {}",
    "toy/plan.py": "from pallas_kernels.shared import SIZE",
    "toy/mosaic_gpu.py": "def run():\n    from pallas_kernels.toy import plan\n    return plan",
    "toy/mosaic_tpu.py": "import pallas_kernels.unused",
}
PROSE = (
    '"""Words."""\nclass Plan:  # a comment\n    """Words."""\n    size: int\n    """Words."""\n'
)
SAME = "class Plan :\n\n    size : int"


@pytest.mark.parametrize(
    ("file", "before", "after", "changed"),
    [
        ("toy/plan.py", PROSE, SAME, ""),
        ("toy/mosaic_gpu.py", "SIZE = 1", "SIZE = 2", "gpu"),
        ("toy/plan.py", "SIZE = 1", "SIZE = 2", "gpu"),
        ("shared.py", "SIZE = 1", "SIZE = 2", "gpu"),
        ("unused.py", "SIZE = 1", "SIZE = 2", "tpu"),
        ("toy/__init__.py", "EVIDENCE = 1", "EVIDENCE = 2", ""),
        ("tables/toy.json", "[1]", "[2]", "gpu tpu"),
        ("tables/other.json", "[1]", "[2]", ""),
    ],
)
def test_a_digest_is_of_the_code_of_a_backend(tmp_path, monkeypatch, file, before, after, changed):
    monkeypatch.setattr(source, "ROOT", tmp_path)
    for folder in ("toy", "tables"):
        (tmp_path / "pallas_kernels" / folder).mkdir(parents=True)
    found = []
    for text in (before, after):
        for name, code in (PACKAGE | {file: f"{PACKAGE.get(file, '')}\n{text}"}).items():
            (tmp_path / "pallas_kernels" / name).write_text(code)
        found.append({x: source.digests(f"mosaic_{x}")["toy"] for x in ("gpu", "tpu")})
    assert [x for x in ("gpu", "tpu") if found[0][x] != found[1][x]] == changed.split()


@pytest.mark.parametrize("backend", ["mosaic_gpu", "mosaic_tpu"])
def test_every_kernel_has_a_digest_of_its_own(backend):
    digests = source.digests(backend)
    assert sorted(digests) == sorted(KERNELS)
    assert len(set(digests.values())) == len(KERNELS)


def test_a_run_counts_for_the_code_that_ran(monkeypatch):
    now = {"digests": {"linear_attention": source.digest("linear_attention", "mosaic_gpu")}}
    earlier = {"digests": {"linear_attention": "of other code"}}
    for record, said in (
        (now, "H200;"),
        (earlier, "H200 (an earlier version);"),
        ({}, "version);"),
    ):
        monkeypatch.setattr(records, "load", lambda path, record=record: record)
        assert said in readme.kernel_evidence("linear_attention")
