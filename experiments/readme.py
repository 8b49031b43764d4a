"""Writes the generated parts of README.md: each from a program that runs, or a recorded result.

    python -m experiments.readme [--check]

It also writes the `report.md` of each recorded experiment, to which the README points. `--check`
writes nothing and fails if a file says something else.
"""

import collections
import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx as flax_nnx

import lcattn.nn
from experiments import benchmark, demo
from experiments.figures import Figure
from experiments.reporting import (
    REPORT,
    Report,
    Table,
    describe_environment,
    describe_machine,
    show_bytes,
)
from lcattn.nn import MixerConfig
from lcattn.ops import dispatch

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RECORDS = ROOT / "benchmarks"

_EXAMPLE = """
import jax
from lcattn import ops

keys = jax.random.split(jax.random.key(0), 3)
q, k, v = (jax.random.normal(key, (1, 4096, 8, 16)) for key in keys)  # [B,T,N,H]

exact = ops.softmax_attention(q, k, v, window=512)  # sliding window, O(T) memory
linear, state = ops.linear_attention(q, k, v, return_state=True)  # BASED: the past in a fixed size
print(exact.shape, linear.shape, "state:", state.kv.shape)

first, state = ops.linear_attention(q[:, :1000], k[:, :1000], v[:, :1000], return_state=True)
rest = ops.linear_attention(q[:, 1000:], k[:, 1000:], v[:, 1000:], initial_state=state)
print("streamed in two pieces, largest difference:", abs(rest - linear[:, 1000:]).max())
"""
_WIDTH, _LENGTH = 1024, 4096
_SOFTMAX = "cudnn_softmax"


def example() -> str:
    """The first program of the README, with what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(_EXAMPLE, {})  # The point is to show what this very text prints.
    return f"```python{_EXAMPLE}```\n```\n{printed.getvalue()}```"


def mechanisms() -> str:
    """What the library holds, from the declarations of its mixers and ops."""
    yes = {True: "yes", False: "no"}
    rows = []
    for config in mixer_configs():
        mixer = config.make(flax_nnx.Rngs(0))
        traits = mixer.traits
        op = dispatch.OPS[mixer.op]
        rows.append(
            (
                f"`nn.{type(config).__name__}`",
                f"`ops.{mixer.op}`",
                ", ".join(op),
                _kernel_evidence(mixer.op),
                yes[traits.causal], yes[traits.streaming], yes[traits.stochastic],
                mixer.time,
                show_bytes(mixer.state_bytes(_LENGTH)),
            )
        )  # fmt: skip
    header = (
        "mixer config", "op", "implementations", "kernel's evidence", "causal", "streams",
        "stochastic", "time", f"state at {_LENGTH:,} tokens",
    )  # fmt: skip
    title = f"State of one float32 stream at width {_WIDTH:,}, default config"
    letters = inspect.cleandoc(lcattn.nn.Mixer.__doc__ or "").partition("time: ")[2]
    return Table(title=title, header=header, rows=rows).markdown() + (
        f"\n\nTime: {' '.join(letters.split())}"
    )


def _kernel_evidence(op: str) -> str:
    """How far the op's kernel has been tried, if it has one."""
    if importlib.util.find_spec(f"pallas_kernels.{op}") is None:
        return "–"
    evidence = importlib.import_module(f"pallas_kernels.{op}").EVIDENCE
    return "; ".join(f"`{backend}`: {', '.join(claims)}" for backend, claims in evidence.items())


def mixer_configs() -> Iterator[MixerConfig]:
    """The default config of every mixer that the library exports."""
    for name in sorted(lcattn.nn.__all__):
        cls = getattr(lcattn.nn, name)
        is_config = isinstance(cls, type) and issubclass(cls, MixerConfig)
        if is_config and not getattr(cls.make, "__isabstractmethod__", False):
            yield cls(width=_WIDTH)


def demo_results() -> str:
    """Tables and figure of the recorded demo."""
    folder = RECORDS / "demo"
    results = _load(folder / "results.json")
    figure = f"![Recall accuracy against bytes of state]({_link(folder / 'recall.png')})"
    blocks = [
        demo.recall_table(results["models"]).markdown(),
        figure,
        demo.text_table(results["models"], results["baselines"]).markdown(),
        describe_environment(results["environment"]),
    ]
    return "\n\n".join(blocks)


def recorded_experiments() -> str:
    """The first figure of each recorded experiment, its command, and the machines."""
    parts, environments = [], []
    for folder, results, page in _experiments():
        figure = next(block for block in page.blocks if isinstance(block, Figure))
        picture, report = _link(folder / figure.file), _link(folder / REPORT)
        parts += [
            f"### {page.title}",
            f"![{figure.caption}]({picture})",
            figure.caption,
            f"[Tables and remarks]({report}) of `{results['environment']['command']}`",
        ]
        environments.append(results["environment"])
    return "\n\n".join([*parts, _machines(environments)])


def reports() -> dict[Path, str]:
    """The text of the report of each recorded experiment."""
    return {folder / REPORT: page.markdown() for folder, _, page in _experiments()}


def _experiments() -> Iterator[tuple[Path, dict[str, Any], Report]]:
    """Folder, results and report of each recorded experiment but the demo, which is shown whole."""
    for folder in sorted(path.parent for path in RECORDS.glob("*/results.json")):
        script = importlib.import_module(f"experiments.{folder.name}")
        if script is not demo:
            results = _load(folder / "results.json")
            yield folder, results, script.report(results)


def benchmarks() -> str:
    """One table a device: the longest length that each recorded benchmark reached."""
    parts = []
    for device in sorted(path for path in RECORDS.iterdir() if path.is_dir()):
        records = [_load(path) for path in sorted(device.glob("*.json"))]
        records = [record for record in records if record.get("script") == "benchmark"]
        if records:
            parts.append(
                _benchmark_table([r for r in records if not r.get("baselines")]).markdown()
            )
            for record in records:
                parts += [table.markdown() for table in benchmark.comparisons(record)]
            environments = [record["environment"] for record in records]
            parts.append("\n".join(f"- `{e['command']}`" for e in environments))
            parts.append(_machines(environments))
    return "\n\n".join(parts)


def _machines(environments: Sequence[Mapping[str, Any]]) -> str:
    """Where records come from, those of one machine and one set of versions in one sentence."""
    days = collections.defaultdict(set)
    for environment in environments:
        days[describe_machine(environment)].add(environment["date"].partition(" ")[0])
    return "\n\n".join(f"{', '.join(sorted(d))} on {machine}." for machine, d in days.items())


def kernels() -> str:
    """Our own kernels against XLA's form of the same op, each in one run."""
    parts = []
    for path in sorted(RECORDS.glob("*/*_kernel.json")):
        record = _load(path)
        rows = [
            (
                row["case"],
                kind.replace("_", " + "),
                ours["kernel_ms"],
                ours["call_ms"],
                f"{100 * ours['floor_share']:.0f} %",
                row["xla"][kind]["kernel_ms"] if "xla" in row else "–",
                *([row[_SOFTMAX][kind]["kernel_ms"]] if _SOFTMAX in row else []),
                max(row["errors"].values()),
            )
            for row in record["rows"]
            for kind, ours in row["mosaic_gpu"].items()
        ]
        softmax = ["cuDNN's softmax, ms"] if _SOFTMAX in record["rows"][0] else []
        header = (
            "case (bfloat16)", "pass", "kernels, ms", "whole call, ms", "of the floor",
            "XLA's kernels, ms", *softmax, "largest error",
        )  # fmt: skip
        title = f"`{path.stem}` on one {record['device']}"
        parts.append(Table(title=title, header=header, rows=rows).markdown())
        parts.append(
            f"`{record['command']}`, jax {record['jax']}. The floor is the largest of the "
            "least FLOPs, bytes and (softplus) exp2 and log2 over their rates. Errors are "
            "relative to float64: the largest of the output and all gradients."
        )
    return "\n\n".join([*parts, _compiled_for_tpus()])


def _compiled_for_tpus() -> str:
    """The memory that kernels take on TPUs, from compiling them: none was at hand to run them."""
    records = {path.stem: _load(path) for path in sorted(RECORDS.glob("tpu/*.json"))}
    rows = [
        (
            f"{kernel}: {row['case']}",
            chip,
            *(_megabytes(size) for size in (row["argument_bytes"], taken["temp_bytes"])),
            _megabytes(max(taken["vmem_bytes"].values())),
        )
        for kernel, record in records.items()
        for row in record["rows"]
        for chip, taken in row["chips"].items()
    ]
    header = ("case (bfloat16), forward + backward", "TPU", "inputs", "HBM besides", "VMEM")
    table = Table(title="Compiled for TPUs, never run: megabytes", header=header, rows=rows)
    record = next(iter(records.values()))
    return table.markdown() + (
        f"\n\n`python -m benchmarks.tpu KERNEL --out benchmarks/tpu`, jax {record['jax']}, libtpu "
        f"{record['libtpu']}. HBM besides inputs and gradients; VMEM of the kernel that takes most."
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}"


def _benchmark_table(records: list[dict[str, Any]]) -> Table:
    rows = [row for record in records for row in benchmark.longest(record)]
    environment = records[0]["environment"]
    header = ("op", "implementation", "pass", "T", "ms", "of the floor", "extra memory")
    return Table(title=f"On one {environment['device']}", header=header, rows=rows)


def _load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _link(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


PARTS = {
    "example": example,
    "demo": demo_results,
    "experiments": recorded_experiments,
    "mechanisms": mechanisms,
    "kernels": kernels,
    "benchmarks": benchmarks,
}


def render(text: str) -> str:
    """The README with every generated part made anew."""
    for name, make in PARTS.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"README.md: expected the lines {begin} and {end}")
        text = f"{before}{begin}\n{make()}\n{end}{after}"
    return text


def main(arguments: list[str]) -> int:
    """Writes README.md and the reports, or with `--check` says which are out of step."""
    if arguments not in ([], ["--check"]):
        print("usage: python -m experiments.readme [--check]", file=sys.stderr)
        return 2
    pages = {README: render(README.read_text()), **reports()}
    stale = [path for path, new in pages.items() if not path.exists() or path.read_text() != new]
    if arguments and stale:
        names = ", ".join(map(_link, stale))
        print(f"out of step: {names}; run: make docs", file=sys.stderr)
        return 1
    if not arguments:
        for path in stale:
            path.write_text(pages[path])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
