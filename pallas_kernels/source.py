"""Which code a record of a kernel is of: a digest of its source, which records carry.

It is of the module of one backend and of all that this imports of `pallas_kernels`, as syntax trees
without docstrings: prose and layout do not change it, nor does the version of Python. A table of
launch parameters that was measured (`tuned`) is part of the kernel.
"""

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_PACKAGE = "pallas_kernels"


def digest(kernel: str, backend: str) -> str:
    """The digest of a kernel's code for a backend, such as "mosaic_gpu"."""
    trees: dict[Path, ast.Module] = {}
    waiting = [_file(f"{_PACKAGE}.{kernel}.{backend}")]
    while waiting:
        path = waiting.pop()
        if path not in trees:
            trees[path] = ast.parse(path.read_text())
            waiting += _imported(trees[path])
    table = ROOT / _PACKAGE / "tables" / f"{kernel}.json"
    parts = [f"{path.relative_to(ROOT).as_posix()} {_code(trees[path])}" for path in sorted(trees)]
    parts += [table.read_text()] if table.exists() else []
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def digests(backend: str) -> dict[str, str]:
    """Those of all kernels for a backend."""
    modules = sorted((ROOT / _PACKAGE).glob(f"*/{backend}.py"))
    return {path.parent.name: digest(path.parent.name, backend) for path in modules}


def _imported(tree: ast.Module) -> Iterator[Path]:
    """The files that a module imports of the package, wherever it does so."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            within = _file(str(node.module))
            names = [_file(f"{node.module}.{alias.name}") for alias in node.names]
            found = {name if name.exists() else within for name in names}
        elif isinstance(node, ast.Import):
            found = {_file(alias.name) for alias in node.names}
        else:
            continue
        yield from (path for path in found if path.is_relative_to(ROOT / _PACKAGE))


def _file(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _code(node: Any) -> str:
    """A syntax tree as text, without the fields that are empty: which there are varies."""
    if isinstance(node, list):
        return f"[{' '.join(_code(x) for x in node if not _is_prose(x))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = (
        f"{name}={_code(value)}" for name, value in ast.iter_fields(node) if value not in (None, [])
    )
    return f"{type(node).__name__}({' '.join(fields)})"


def _is_prose(node: Any) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
