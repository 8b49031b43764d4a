"""What `implementation=None` takes on which machine: asked of mixers, without the machine."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.reporting import Table
from lcattn.nn import Mixer, MixerConfig, TokenMixer
from lcattn.ops import dispatch

_MACHINES = {"CPU": "cpu", "Hopper GPU": "gpu", "TPU": "tpu"}
_LENGTH = 32_768
_PLAIN = "xla"


def table(configs: Iterable[MixerConfig], width: int) -> str:
    """What the ops of mixers of a width take beside plain XLA, in Markdown."""
    rows, others = [], []
    for config in configs:
        config = dataclasses.replace(config, dtype="bfloat16")
        mixer = nnx.eval_shape(functools.partial(_made, config))
        name = f"`nn.{type(config).__name__}`"
        cells = [_cell(mixer, width, platform) for platform in _MACHINES.values()]
        if set(cells) == {_PLAIN}:
            others.append(name)
        else:
            rows.append((name, *cells))
    title = "What `implementation=None` takes on one device, for each mixer's defaults in bfloat16"
    shown = Table(title=title, header=("mixer config", *_MACHINES), rows=rows).markdown()
    return (
        f"{shown}\n\nRows of {_LENGTH:,} tokens first; then packed rows and one token of a stream, "
        f"where they differ. `{_PLAIN}` throughout: {', '.join(others)}."
    )


def _made(config: MixerConfig) -> Mixer:
    return config.make(nnx.Rngs(0))


def _cell(mixer: Mixer, width: int, platform: str) -> str:
    """What is taken for rows, and for other calls where that differs."""
    calls = ("packed", "one token") if mixer.traits.streaming else ("packed",)
    rows = choice(mixer, width, "rows", platform)
    others = {call: choice(mixer, width, call, platform) for call in calls}
    return "; ".join([rows, *(f"{call}: {x}" for call, x in others.items() if x != rows)])


class _ChosenError(Exception):
    """Ends a call of a mixer as soon as its op has chosen."""


def choice(mixer: Mixer, width: int, call: str, platform: str) -> str:
    """The implementation that a mixer's op takes unasked, on one device.

    Args:
      mixer: may be abstract.
      width: of its inputs.
      call: "rows" of many tokens, "packed" ones, or "one token" of a stream.
      platform: "cpu", "gpu" (a Hopper GPU) or "tpu".
    """
    graph, state = nnx.split(mixer)
    try:
        with _pretended(platform, mixer.op):
            jax.eval_shape(lambda state: _run(nnx.merge(graph, state), width, call), state)
    except _ChosenError as chosen:
        return str(chosen)
    raise AssertionError(f"{mixer}: its op was not called")


def _run(mixer: Mixer, width: int, call: str) -> None:
    length = 1 if call == "one token" else _LENGTH
    x = jnp.zeros((1, length, width), jnp.bfloat16)
    ids = jnp.zeros((1, length), jnp.int32)
    tokens: dict[str, Any] = {"tokens": ids} if isinstance(mixer, TokenMixer) else {}
    if call == "one token":
        mixer.extend(x, mixer.init_state(1, _LENGTH), **tokens)
    else:
        mixer(x, ids if call == "packed" else None, **tokens)


@contextlib.contextmanager
def _pretended(platform: str, op: str) -> Iterator[None]:
    """Ops choose as on one device of a platform, and `op` does no more than that."""

    def choose(name: str, implementation: str | None, **call: Any) -> Any:
        if dispatch.OPS[name] is dispatch.OPS[op]:
            raise _ChosenError(dispatch.best(name, **call))
        return dispatch.OPS[name][implementation or _PLAIN].run

    with (
        mock.patch.object(dispatch, "choose", choose),
        mock.patch.object(dispatch, "default_platform", return_value=platform),
        mock.patch.object(dispatch, "on_hopper", return_value=platform == "gpu"),
        mock.patch.object(jax, "device_count", return_value=1),
    ):
        yield
