"""All that was measured and recorded: `benchmarks/README.md`, made from the records alone."""

import collections
import importlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import benchmark, demo
from experiments.figures import Figure
from experiments.reporting import REPORT, Report, Table, describe_machine
from pallas_kernels import source

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "benchmarks"
PAGE = RECORDS / "README.md"

_PAGE = """# What was measured

Made by `make docs` from the records beside it; each came from one command on one machine, which it
names.

## Experiments

{experiments}

## Kernels

{kernels}
{decoding}
## Ours beside others

One process each: the longest length that an implementation was timed at, after its results were
checked against the definition at 2,048 tokens. `lcattn` is what `implementation=None` runs. Arrays
that stay in a cache beat the floor, which is that of memory. On a GPU, ms is time on the device; a
call takes 0.1 to 0.4 ms more on the host while nothing else keeps the device busy.

{benchmarks}
"""
_SOFTMAX = "cudnn_softmax"

_ONE_TOKEN = """## One token

What a token costs against the bytes that it must move: the state of linear attention, read and
written, or all keys and values, read."""


def page() -> str:
    """The text of `PAGE`."""
    return _PAGE.format(
        experiments=gallery(experiments()),
        kernels=kernels(),
        decoding=decoding(),
        benchmarks=benchmarks(),
    )


class Recorded(NamedTuple):
    """A recorded experiment: where it lies, its results, and the report made from them."""

    folder: Path
    results: Mapping[str, Any]
    report: Report

    @property
    def title(self) -> str:
        """The report's, and what sets a further record of the same script apart."""
        further = self.folder.name.removeprefix(self.results["script"]).replace("_", " ").strip()
        return f"{self.report.title}: {further}" if further else self.report.title


def experiments() -> Iterator[Recorded]:
    """Each recorded experiment but the demo, which the README shows whole."""
    for folder in sorted(path.parent for path in RECORDS.glob("*/results.json")):
        results = load(folder / "results.json")
        script = importlib.import_module(f"experiments.{results['script']}")
        if script is not demo:
            yield Recorded(folder, results, script.report(results))


def gallery(recorded: Iterable[Recorded], root: Path = RECORDS) -> str:
    """The first figure of each experiment, its command, and the machines; links are from `root`."""
    parts, environments = [], []
    for record in recorded:
        figure = next(block for block in record.report.blocks if isinstance(block, Figure))
        where, environment = (
            record.folder.relative_to(root).as_posix(),
            record.results["environment"],
        )
        parts += [
            f"### {record.title}",
            f"![{figure.caption}]({where}/{figure.file})",
            figure.caption,
            f"[Tables and remarks]({where}/{REPORT}) of `{environment['command']}`",
        ]
        environments.append(environment)
    return "\n\n".join([*parts, machines(environments)])


def kernels() -> str:
    """Our own kernels against XLA's form of the same op, each in one run."""
    parts = []
    for path in sorted(RECORDS.glob("*/*_kernel.json")):
        record = load(path)
        softmax = ["cuDNN's softmax, ms"] if _SOFTMAX in record["rows"][0] else []
        rows = [
            (
                row["case"],
                kind.replace("_", " + "),
                ours["kernel_ms"],
                ours["call_ms"],
                f"{100 * ours['floor_share']:.0f} %",
                _milliseconds(row, "xla", kind),
                *([_milliseconds(row, _SOFTMAX, kind)] if softmax else []),
                max(row["errors"].values(), default="–"),
            )
            for row in record["rows"]
            for kind, ours in row["mosaic_gpu"].items()
        ]
        header = (
            "case (bfloat16)", "pass", "kernels, ms", "whole call, ms", "of the floor",
            "XLA's kernels, ms", *softmax, "largest error",
        )  # fmt: skip
        title = f"`{path.stem}` on one {record['device']}"
        parts.append(Table(title=title, header=header, rows=rows).markdown())
        parts.append(
            f"`{record['command']}`, jax {record['jax']}. The floor is the largest of the "
            "least FLOPs, bytes and (softplus) exp2 and log2 over their rates. Errors are "
            "relative to float64: the largest of the output and all gradients. Kernels are summed "
            "in a few calls under a profiler, whole calls timed in others without one: where the "
            "device's clock moved between the two, the sum may exceed the call."
            + (f" {record['note']}" if "note" in record else "")
            + _checked(record)
            + _outcome(record["rows"])
            + _age(record, path.stem.removesuffix("_kernel"))
        )
    parts += [
        _growth(load(path)) for path in sorted(RECORDS.glob("*/linear_attention_growth.json"))
    ]
    return "\n\n".join([*parts, _mechanisms(), repeated(), _compiled_for_tpus()])


def _checked(record: Mapping[str, Any]) -> str:
    """What was compared with float64 and not timed."""
    errors = {row["case"]: max(row["errors"].values()) for row in record.get("checks", [])}
    if not errors:
        return ""
    checked = "; ".join(f"{case}: {error:.1e}" for case, error in errors.items())
    return f" Compared, but not timed: {checked}."


def _outcome(rows: Sequence[Mapping[str, Any]]) -> str:
    """Whether later calls gave the same bits as a first, if a record's rows say so."""
    calls = [row["later_calls"] for row in rows if "later_calls" in row]
    if not calls:
        return ""
    changed = [
        f"{row['case']}: " + ", ".join(f"{name} in {n}" for name, n in row["changed"].items())
        for row in rows if row.get("changed")
    ]  # fmt: skip
    return f" Of at least {min(calls)} later calls of a shape " + (
        "none changed a bit." if not changed else f"some changed bits of {'; '.join(changed)}."
    )


def repeated() -> str:
    """Which kernels gave the same bits in every call."""
    parts = []
    for path in sorted(RECORDS.glob("*/repeats.json")):
        record = load(path)
        rows: dict[str, list[dict[str, Any]]] = {}
        for row in record["rows"]:
            rows.setdefault(row["kernel"], []).append(row)
        table = Table(
            title=f"The same call again, output and gradients, on one {record['device']}",
            header=("kernel", "shapes", "later calls", "shapes with a changed bit", "failed"),
            rows=[
                (
                    f"`{kernel}`", len(of), sum(row.get("later_calls", 0) for row in of),
                    sum(bool(row.get("changed")) for row in of), sum("error" in row for row in of),
                )
                for kernel, of in rows.items()
            ],
        )  # fmt: skip
        said = f"`{record['command']}`, jax {record['jax']}." + _age(record, *rows)
        parts += [table.markdown(), said]
    return "\n\n".join(parts)


def _mechanisms() -> str:
    """Mechanisms on the kernels of block-sparse attention, beside exact attention and XLA."""
    record = load(RECORDS / "h200" / "sparse_mechanisms.json")
    rows = [
        (
            row["case"],
            kind.replace("_", " + "),
            ours["kernel_ms"],
            ours["call_ms"],
            *(_milliseconds(row, peer, kind) for peer in ("cudnn_exact", "xla")),
            max(row["errors"].values(), default="–"),
        )
        for row in record["rows"]
        for kind, ours in row["block_sparse"].items()
    ]
    header = (
        "mechanism (bfloat16)", "pass", "kernels, ms", "whole call, ms",
        "exact attention by cuDNN, ms", "XLA's kernels, ms", "largest error",
    )  # fmt: skip
    title = f"Mechanisms as plans of blocks, on one {record['device']}"
    return Table(title=title, header=header, rows=rows).markdown() + (
        f"\n\n`{record['command']}`, jax {record['jax']}. Errors are relative to the mechanism's "
        "own XLA form in float32, at a smaller length: the largest of the output and all gradients."
        + _age(record, "block_sparse_attention")
    )


def _growth(record: Mapping[str, Any]) -> str:
    """Whether the time of the linear-attention kernels is linear in the length."""
    rows = []
    for before, row in itertools.pairwise(record["rows"]):
        if row["T"] == 2 * before["T"]:
            passes = ("forward", "forward_backward")
            pairs = [(row[kind], row[kind] / before[kind] / 2) for kind in passes]
            rows.append((row["feature_map"], row["T"], *itertools.chain(*pairs)))
    header = (
        "features", "tokens", "forward, ms", "growth over linear", "forward + backward, ms",
        "growth over linear",
    )  # fmt: skip
    title = f"Kernels of linear attention as a row doubles, on one {record['device']}"
    table = Table(title=title, header=header, rows=rows).markdown()
    return f"{table}\n\n`{record['command']}`, jax {record['jax']}. One row of 16 heads." + (
        _age(record, "linear_attention", "gated_linear_attention")
    )


def is_of_present_code(record: Mapping[str, Any], kernel: str, backend: str) -> bool:
    """Whether a record says that it is of a kernel's code as it is now, apart from prose."""
    return record.get("digests", {}).get(kernel) == source.digest(kernel, backend)


def _age(record: Mapping[str, Any], *kernels: str) -> str:
    is_present = all(is_of_present_code(record, kernel, "mosaic_gpu") for kernel in kernels)
    return "" if is_present else " The record is of an earlier version of these kernels."


def _milliseconds(row: dict[str, Any], form: str, kind: str) -> float | str:
    return row.get(form, {}).get(kind, {}).get("kernel_ms", "–")


def _compiled_for_tpus() -> str:
    """The memory that kernels take on TPUs, from compiling them: none was at hand to run them."""
    records = {path.stem: load(path) for path in sorted(RECORDS.glob("tpu/*.json"))}
    rows = [
        (
            kernel,
            row["case"],
            _megabytes(row["argument_bytes"]),
            " / ".join(_megabytes(taken["temp_bytes"]) for taken in row["chips"].values()),
            " / ".join(
                _megabytes(max(taken["vmem_bytes"].values())) for taken in row["chips"].values()
            ),
        )
        for kernel, record in records.items()
        for row in record["rows"]
    ]
    chips = " / ".join(next(iter(records.values()))["rows"][0]["chips"])
    header = (
        "kernel", "case (bfloat16), forward + backward", "inputs", f"HBM besides, {chips}",
        f"VMEM, {chips}",
    )  # fmt: skip
    table = Table(title="Compiled for TPUs, never run: megabytes", header=header, rows=rows)
    record = next(iter(records.values()))
    earlier = [
        f"`{kernel}`"
        for kernel, record in records.items()
        if not is_of_present_code(record, kernel, "mosaic_tpu")
    ]
    return table.markdown() + (
        f"\n\n`python -m benchmarks.tpu KERNEL --out benchmarks/tpu`, jax {record['jax']}, libtpu "
        f"{record['libtpu']}. HBM besides inputs and gradients; VMEM of the kernel that takes most."
        + (f" Of an earlier version: {', '.join(earlier)}." if earlier else "")
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}"


def decoding() -> str:
    """The section on one step of each mechanism, and on models that generate, if recorded."""
    parts = []
    for path in sorted(RECORDS.glob("*/decode.json")):
        record = load(path)
        rows = [
            (
                row["case"], row["ms"], f"{row['bytes'] / 1e6:,.0f}",
                f"{row['bytes'] / row['ms'] / 1e9:.2f}", f"{100 * row['floor_share']:.0f} %",
                row["error"],
            )
            for row in record["rows"]
        ]  # fmt: skip
        header = ("case (bfloat16)", "ms", "megabytes", "TB/s", "of the floor", "error")
        title = f"On one {record['device']}"
        parts.append(Table(title=title, header=header, rows=rows).markdown())
        parts.append(
            f"`{record['command']}`, jax {record['jax']}. The floor is that of copying, "
            f"{record['bandwidth'] / 1e12:.1f} TB/s; reading alone reached "
            f"{record['read_rate'] / 1e12:.2f} TB/s in the same process. States of up to 50 MB "
            "stay in the GPU's cache. Errors are relative to float64."
        )
    for path in sorted(RECORDS.glob("*/generation.json")):
        parts += _generation(load(path))
    return f"\n{_ONE_TOKEN}\n\n" + "\n\n".join(parts) + "\n" if parts else ""


def _generation(record: Mapping[str, Any]) -> list[str]:
    """The table of models that generate, and what it says of them."""
    rows = [
        (
            row["model"], row["parameters"], f"{row['state_bytes'] / 1e6:,.1f}",
            row["tokens_per_second"], row["prefill_seconds"], row["step_ms"],
            f"{100 * row['floor_share']:.0f} %",
        )
        for row in record["rows"]
    ]  # fmt: skip
    header = (
        "model", "parameters", "state of a stream, MB", "tokens/s", "prompts, s", "ms a step",
        "of the floor",
    )  # fmt: skip
    size = record["size"]
    title = (
        f"{size['batch_size']} streams of {size['tokens']:,} tokens after prompts of "
        f"{size['prompt']:,}, on one {record['device']}"
    )
    first, last = record["rows"][0], record["rows"][-1]
    ratio = first["tokens_per_second"] / last["tokens_per_second"]
    return [
        Table(title=title, header=header, rows=rows).markdown(),
        f"{first['model']} makes {ratio:.1f} times the tokens of {last['model']} attention, which "
        "decodes by cuDNN. The paper (arXiv 2402.18668) has 24 times, over FlashAttention-2.",
        f"`{record['command']}`, jax {record['jax']}. The floor is that of reading weights and "
        "states once.",
    ]


def benchmarks() -> str:
    """One table a device: the longest length that each recorded benchmark reached."""
    parts = []
    for device in sorted(path for path in RECORDS.iterdir() if path.is_dir()):
        records = [load(path) for path in sorted(device.glob("*.json"))]
        records = [record for record in records if record.get("script") == "benchmark"]
        if records:
            parts.append(
                _benchmark_table([r for r in records if not r.get("baselines")]).markdown()
            )
            for record in records:
                parts += [table.markdown() for table in benchmark.comparisons(record)]
            environments = [record["environment"] for record in records]
            parts.append("\n".join(f"- `{e['command']}`" for e in environments))
            parts.append(machines(environments))
    return "\n\n".join(parts)


def _benchmark_table(records: list[dict[str, Any]]) -> Table:
    rows = [row for record in records for row in benchmark.longest(record)]
    environment = records[0]["environment"]
    header = ("op", "implementation", "pass", "T", "ms", "of the floor", "extra memory")
    return Table(title=f"On one {environment['device']}", header=header, rows=rows)


def machines(environments: Sequence[Mapping[str, Any]]) -> str:
    """Where records come from, those of one machine and one set of versions in one sentence."""
    days = collections.defaultdict(set)
    for environment in environments:
        days[describe_machine(environment)].add(environment["date"].partition(" ")[0])
    return "\n\n".join(f"{', '.join(sorted(d))} on {machine}." for machine, d in days.items())


def load(path: Path) -> dict[str, Any]:
    """A record."""
    return json.loads(path.read_text())
