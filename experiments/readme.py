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
import lcattn.ops
from experiments import choices, demo, records, registry
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
_OWN_MODEL = """
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from lcattn import nn

mixer = nn.LinearAttentionConfig(width=64, num_heads=4).make(nnx.Rngs(0))
x = jax.random.normal(jax.random.key(0), (8, 96, 64))  # [B,T,D]
y = mixer(x)

# Train it: a Flax NNX module like any other.
loss, gradients = nnx.jit(nnx.value_and_grad(lambda mixer: jnp.mean(mixer(x) ** 2)))(mixer)

# Stream it: in pieces of any length, a prompt or one token.
state = mixer.init_state(batch_size=8, max_length=96)
first, state = mixer.extend(x[:, :48], state)
rest, state = mixer.extend(x[:, 48:], state)
print("streamed as in one call:", jnp.allclose(rest, y[:, 48:], atol=1e-6))

# Pack it: two documents of 48 tokens in each row; a negative id would be padding.
documents = jnp.broadcast_to(jnp.arange(96) // 48, (8, 96))
packed = mixer(x, documents)
print("the second document starts anew:", not jnp.allclose(packed[:, 48:], y[:, 48:], atol=1e-6))

# Shard it: the batch over all devices; parameters name their logical axes, `param.axes`.
mesh = jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))
sharded = mixer(jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))

# Probe it: who reads whom, [B,N,T,T], and what a stream of a million tokens holds.
print(mixer.attention_map(x).shape, mixer.state_bytes(1_000_000))
"""
_WIDTH, _LENGTH = 1024, 4096
_HIGHLIGHTS = ("recall", "icl_mixers", "induction_heads", "length_extrapolation")


def example() -> str:
    """The first program of the README, with what it prints."""
    return _with_output(_EXAMPLE)


def own_model() -> str:
    """A mixer trained, streamed, packed, sharded and probed, with what the program prints."""
    return _with_output(_OWN_MODEL)


def _with_output(program: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program, {})  # The point is to show what this very text prints.
    return f"```python{program}```\n```\n{printed.getvalue()}```"


def mechanisms() -> str:
    """What the library holds, from the declarations of its mixers and ops."""
    yes = {True: "yes", False: "no"}
    rows = []

    def add(config: MixerConfig) -> None:
        mixer = config.make(flax_nnx.Rngs(0))
        traits = mixer.traits
        rows.append(
            (
                f"`{type(config).__name__}`",
                (inspect.getdoc(config) or "").partition("\n")[0],
                f"`{mixer.op}`",
                yes[traits.causal], yes[traits.streaming], yes[traits.stochastic],
                mixer.time,
                show_bytes(mixer.state_bytes(_LENGTH)),
            )
        )  # fmt: skip

    for config in mixer_configs():
        jax.eval_shape(functools.partial(add, config))  # draws no parameters
    header = (
        "`lcattn.nn`", "what it is", "`lcattn.ops`", "causal", "streams", "stochastic", "time",
        f"state at {_LENGTH:,} tokens",
    )  # fmt: skip
    title = f"State of one float32 stream at width {_WIDTH:,}, default config"
    letters = inspect.cleandoc(lcattn.nn.Mixer.__doc__ or "").partition("time: ")[2]
    return Table(title=title, header=header, rows=rows).markdown() + (
        f"\n\nTime: {' '.join(letters.split())}"
    )


def implementations() -> str:
    """What each op can run, best first, and how far its kernels have been tried."""
    rows = [
        (f"`{op}`", ", ".join(table), kernel_evidence(op))
        for op, table in dispatch.OPS.items()
        if op in lcattn.ops.__all__
    ]
    header = ("`lcattn.ops`", "implementations, best first", "what its kernels have gone through")
    return Table(title="Forms of each op", header=header, rows=sorted(rows)).markdown()


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
    return (config(width=_WIDTH) for config in registry.mixer_configs())


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
    "implementations": implementations,
    "choices": chosen,
    "own model": own_model,
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
