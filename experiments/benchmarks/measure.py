"""Compiled programs and their times."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, override

import jax
import jax.numpy as jnp

from experiments.benchmarks.base import Implementation, Inputs
from lcattn.config import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimingConfig(Config):
    """How to measure.

    Attributes:
      repetitions: samples of each program; medians, minima and maxima are taken over them.
      min_sample_ms: a program is called in a row until one sample lasts as long.
      max_seconds: after this much time a program gets no further sample, if it has three.
    """

    repetitions: int = 7
    min_sample_ms: float = 5.0
    max_seconds: float = 10.0

    @override
    def validate(self) -> None:
        self.require_positive("repetitions", "min_sample_ms", "max_seconds")


@dataclasses.dataclass(frozen=True)
class Program:
    """A computation ready to run on its inputs.

    Attributes:
      run: computes, waits for the end, and returns output and gradients by name as JAX arrays.
      call: the same without handing the result over; this is what is timed.
      temp_bytes: memory beside inputs and outputs, by the compiler's account.
      device_ms: time on the device alone, for a number of calls; None if it cannot be told.
    """

    run: Callable[[], dict[str, jax.Array]]
    call: Callable[[], Any]
    temp_bytes: int | None
    device_ms: Callable[[int], float | None]


def compile_program(
    implementation: Implementation, inputs: Inputs, cotangent: jax.Array | None
) -> Program:
    """Compiles a forward pass, or with a cotangent a forward and a backward pass."""
    if implementation.framework == "torch":
        from experiments.benchmarks import torch_program

        return torch_program.build(implementation.run, inputs, cotangent)

    def forward(inputs: Inputs) -> dict[str, jax.Array]:
        return {"out": implementation.run(**inputs)}

    def forward_backward(inputs: Inputs, cotangent: jax.Array) -> dict[str, jax.Array]:
        out, pull = jax.vjp(lambda arrays: implementation.run(**arrays), inputs)
        return {"out": out} | pull(cotangent)[0]

    function = forward if cotangent is None else forward_backward
    arguments = (inputs,) if cotangent is None else (inputs, cotangent)
    compiled = jax.jit(function).lower(*arguments).compile()
    memory = compiled.memory_analysis()

    def run() -> dict[str, jax.Array]:
        return jax.block_until_ready(compiled(*arguments))

    return Program(
        run, run, memory.temp_size_in_bytes if memory else None,
        functools.partial(_gpu_time, compiled, arguments),
    )  # fmt: skip


def _gpu_time(
    compiled: jax.stages.Compiled, arguments: tuple[Any, ...], iterations: int
) -> float | None:
    """Median time of all kernels of a call, as the GPU's own counters give it."""
    if jax.default_backend() != "gpu":
        return None
    from jax.experimental.mosaic.gpu import profiler

    try:
        _, times = profiler.measure(compiled, iterations=iterations)(*arguments)
    except RuntimeError:  # The calls launched different kernels, so times cannot be paired.
        return None
    if times is None:
        return None
    return statistics.median(times if isinstance(times, list) else [times])


def interleaved(programs: Mapping[str, Program], timing: TimingConfig) -> dict[str, list[float]]:
    """Milliseconds per call of each program, sampled in turn so that drift hits all alike."""
    calls = {name: _calls_per_sample(program, timing) for name, program in programs.items()}
    samples: dict[str, list[float]] = {name: [] for name in programs}
    spent = dict.fromkeys(programs, 0.0)
    for _ in range(timing.repetitions):
        for name, program in programs.items():
            if len(samples[name]) >= 3 and spent[name] > timing.max_seconds:
                continue
            seconds = _seconds(program, calls[name])
            spent[name] += seconds
            samples[name].append(1000 * seconds / calls[name])
    return samples


def _calls_per_sample(program: Program, timing: TimingConfig) -> int:
    _seconds(program, 1)  # warm-up
    once = 1000 * _seconds(program, 1)
    return max(1, round(timing.min_sample_ms / max(once, 1e-3)))


def _seconds(program: Program, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        program.call()
    return time.perf_counter() - start


def relative_error(got: jax.Array, expected: jax.Array) -> float:
    """Root mean square of the difference over that of the expected array; NaN if not finite."""
    difference = jnp.linalg.norm((got.astype(jnp.float32) - expected).ravel())
    # An input that does not matter has a gradient of zeros.
    size = jnp.maximum(jnp.linalg.norm(expected.ravel()), jnp.finfo(jnp.float32).tiny)
    return float(difference / size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What the machine reaches at best, measured in the same run.

    Attributes:
      matrix: FLOP/s of a large matrix product.
      copy: bytes/s, read and written, of a large elementwise operation.
    """

    matrix: float
    copy: float

    def floor_ms(self, flops: float, moved: float) -> float:
        """The least time for the given FLOPs and bytes."""
        return 1000 * max(flops / self.matrix, moved / self.copy)


def measure_rates(dtype: str, timing: TimingConfig) -> Rates:
    """Times a matrix product and a copy that are large for the device."""
    on_cpu = jax.default_backend() == "cpu"
    size, count = (1024, 1 << 24) if on_cpu else (8192, 1 << 29)
    matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    vector = jnp.zeros(count, jnp.dtype(dtype))
    programs = {
        "matrix": compile_program(Implementation(lambda x: x @ x), {"x": matrix}, None),
        "copy": compile_program(Implementation(lambda x: x + 1), {"x": vector}, None),
    }
    best = {
        name: (programs[name].device_ms(timing.repetitions) or min(ms)) / 1000
        for name, ms in interleaved(programs, timing).items()
    }
    return Rates(matrix=2 * size**3 / best["matrix"], copy=2 * vector.nbytes / best["copy"])
