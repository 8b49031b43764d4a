"""Writes the generated parts of README.md: each from a program that runs, or a recorded result.

    python -m experiments.readme [--check]

It also writes `benchmarks/README.md` (`experiments.records`) and the `report.md` of each recorded
experiment, to which the README points. `--check` writes nothing and fails if a file says something
else.
"""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
from flax import nnx as flax_nnx

import lcattn.nn
from experiments import choices, demo, records
from experiments.records import RECORDS, ROOT
from experiments.reporting import REPORT, Table, describe_environment, show_bytes
from lcattn.nn import MixerConfig
from lcattn.ops import dispatch

README = ROOT / "README.md"

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
_HIGHLIGHTS = ("recall", "icl_mixers", "induction_heads", "length_extrapolation")


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

    def add(config: MixerConfig) -> None:
        mixer = config.make(flax_nnx.Rngs(0))
        traits = mixer.traits
        op = dispatch.OPS[mixer.op]
        rows.append(
            (
                f"`nn.{type(config).__name__}`",
                f"`ops.{mixer.op}`",
                ", ".join(op),
                kernel_evidence(mixer.op),
                yes[traits.causal], yes[traits.streaming], yes[traits.stochastic],
                mixer.time,
                show_bytes(mixer.state_bytes(_LENGTH)),
            )
        )  # fmt: skip

    for config in mixer_configs():
        jax.eval_shape(functools.partial(add, config))  # draws no parameters
    header = (
        "mixer config", "op", "implementations", "kernel's evidence", "causal", "streams",
        "stochastic", "time", f"state at {_LENGTH:,} tokens",
    )  # fmt: skip
    title = f"State of one float32 stream at width {_WIDTH:,}, default config"
    letters = inspect.cleandoc(lcattn.nn.Mixer.__doc__ or "").partition("time: ")[2]
    return Table(title=title, header=header, rows=rows).markdown() + (
        f"\n\nTime: {' '.join(letters.split())}"
    )


def kernel_evidence(op: str) -> str:
    """How far the op's kernel has been tried, if it has one."""
    if importlib.util.find_spec(f"pallas_kernels.{op}") is None:
        return "–"
    evidence = importlib.import_module(f"pallas_kernels.{op}").EVIDENCE
    return "; ".join(
        f"`{backend}`: {', '.join(_dated(op, backend, claim) for claim in claims)}"
        for backend, claims in evidence.items()
    )


def _dated(op: str, backend: str, claim: str) -> str:
    """A claim, and whether it is of earlier code: the tests redo all but runs on a GPU."""
    if claim != "run on an H200":
        return claim
    record = records.load(RECORDS / "h200" / f"{op}_kernel.json")
    return (
        claim
        if records.is_of_present_code(record, op, backend)
        else f"{claim} (an earlier version)"
    )


def mixer_configs() -> Iterator[MixerConfig]:
    """The default config of every mixer that the library exports."""
    for name in sorted(lcattn.nn.__all__):
        cls = getattr(lcattn.nn, name)
        is_config = isinstance(cls, type) and issubclass(cls, MixerConfig)
        if is_config and not getattr(cls.make, "__isabstractmethod__", False):
            yield cls(width=_WIDTH)


def chosen() -> str:
    """What runs unasked on which machine."""
    return choices.table(mixer_configs(), _WIDTH)


def demo_results() -> str:
    """Tables and figure of the recorded demo."""
    folder = RECORDS / "demo"
    results = records.load(folder / "results.json")
    figure = f"![Recall accuracy against bytes of state]({_link(folder / 'recall.png')})"
    blocks = [
        demo.recall_table(results["models"]).markdown(),
        figure,
        demo.text_table(results["models"], results["baselines"]).markdown(),
        describe_environment(results["environment"]),
    ]
    return "\n\n".join(blocks)


def highlights() -> str:
    """What a few experiments found, and where the others are."""
    others = {recorded.folder.name: recorded for recorded in records.experiments()}
    shown = [others.pop(name) for name in _HIGHLIGHTS]
    links = (f"[{o.title}]({_link(o.folder / REPORT)})" for o in others.values())
    return f"{records.gallery(shown, root=ROOT)}\n\nAlso: {', '.join(links)}."


def kernels() -> str:
    """The first case of each record of our own kernels."""
    rows, devices, notes, earlier = [], set(), [], []
    for path in sorted(RECORDS.glob("*/*_kernel.json")):
        record = records.load(path)
        devices.add(record["device"])
        first, kernel = record["rows"][0], path.stem.removesuffix("_kernel")
        op = f"`{kernel}`"
        notes += [f"{op}. {record['note']}"] if "note" in record else []
        earlier += [] if records.is_of_present_code(record, kernel, "mosaic_gpu") else [op]
        for kind, ours in first["mosaic_gpu"].items():
            xla = first["xla"][kind]["kernel_ms"]
            rows.append(
                (
                    op, first["case"],
                    kind.replace("_", " + "), ours["kernel_ms"],
                    f"{100 * ours['floor_share']:.0f} %", xla, f"{xla / ours['kernel_ms']:.1f} ×",
                )
            )  # fmt: skip
    header = ("op", "case (bfloat16)", "pass", "ms", "of the floor", "XLA's form, ms", "faster")
    table = Table(title=f"On one {', '.join(sorted(devices))}", header=header, rows=rows).markdown()
    notes += [f"Measured of an earlier version: {', '.join(earlier)}."] if earlier else []
    return "\n\n".join([table, *notes])


def pages() -> dict[Path, str]:
    """The generated pages beside the README."""
    return {
        records.PAGE: records.page(),
        **{o.folder / REPORT: o.report.markdown() for o in records.experiments()},
    }


def _link(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


PARTS = {
    "example": example,
    "demo": demo_results,
    "experiments": highlights,
    "mechanisms": mechanisms,
    "choices": chosen,
    "kernels": kernels,
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
    files = {README: render(README.read_text()), **pages()}
    stale = [path for path, new in files.items() if not path.exists() or path.read_text() != new]
    if arguments and stale:
        names = ", ".join(map(_link, stale))
        print(f"out of step: {names}; run: make docs", file=sys.stderr)
        return 1
    if not arguments:
        for path in stale:
            path.write_text(files[path])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
