"""Tokens a second that BASED and a softmax transformer of one size generate, in one process.

    python -m benchmarks.generation --out benchmarks/h200/generation.json

The set-up of BASED (Arora et al. 2024, arXiv 2402.18668): 1.3B parameters, 1,024 tokens after a
prompt of 1,024, 128 streams; weights are random, on which the time does not depend. `--size tiny`
is a rehearsal for a CPU.
"""

import argparse
import functools
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.compiling import compile_all
from benchmarks.kernels import BANDWIDTH, save
from lcattn.models import LM, LMConfig, generate
from lcattn.nn import LinearAttentionConfig, ShortConvolutionConfig, SoftmaxAttentionConfig

# As published: width, layers, heads, and the layers of BASED with linear and sliding attention.
_SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "width": 64, "num_layers": 4, "num_heads": 4, "linear": (1,), "sliding": (2,),
        "vocab_size": 256, "batch_size": 2, "prompt": 32, "tokens": 32,
    },
    "1.3b": {
        "width": 1792, "num_layers": 36, "num_heads": 16, "linear": (1, 6, 11, 16, 21, 27, 33),
        "sliding": (2, 7, 12, 17, 22, 28, 34), "vocab_size": 50_264, "batch_size": 128,
        "prompt": 1024, "tokens": 1024,
    },
}  # fmt: skip


def configs(size: Mapping[str, Any]) -> dict[str, LMConfig]:
    """BASED and the transformer of its width and depth."""
    heads, layers = size["num_heads"], range(size["num_layers"])
    kinds = {**dict.fromkeys(size["linear"], "linear"), **dict.fromkeys(size["sliding"], "sliding")}
    patterns = {
        "BASED": tuple(kinds.get(layer, "convolution") for layer in layers),
        "softmax": ("softmax",),
    }
    return {
        name: LMConfig(
            vocab_size=size["vocab_size"],
            width=size["width"],
            num_layers=size["num_layers"],
            pattern=pattern,
            mixers={
                "softmax": SoftmaxAttentionConfig(num_heads=heads),
                "sliding": SoftmaxAttentionConfig(num_heads=heads, window=129),
                "linear": LinearAttentionConfig(num_heads=heads, feature_dim=16),
                "convolution": ShortConvolutionConfig(),
            },
            dtype="bfloat16",
            param_dtype="bfloat16",
        )
        for name, pattern in patterns.items()
    }


def abstract(config: LMConfig) -> LM:
    """The model without its numbers."""
    return nnx.eval_shape(lambda: config.make(nnx.Rngs(0)))


def compiled(config: LMConfig, size: Mapping[str, Any], count: int) -> Any:
    """The program that reads the prompts and adds `count` tokens, of parameters and prompts."""
    graph, parameters = nnx.split(abstract(config))

    def run(parameters, prompt):
        return generate(nnx.merge(graph, parameters), prompt, count, temperature=0.0)

    prompt = jax.ShapeDtypeStruct((size["batch_size"], size["prompt"]), jnp.int32)
    return jax.jit(run).lower(parameters, prompt).compile()


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random(seed: int, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return 0.02 * jax.random.normal(jax.random.key(seed), shape, dtype)


def random_parameters(model: LM) -> nnx.State:
    """Numbers for a model, by a program a shape: one for all layers takes long to compile."""
    leaves, structure = jax.tree.flatten(nnx.state(model))
    return structure.unflatten(_random(i, x.shape, x.dtype) for i, x in enumerate(leaves))


def measure(
    name: str, config: LMConfig, size: Mapping[str, Any], programs: tuple[Any, Any], repeats: int
) -> dict[str, Any]:
    """One model: seconds for the prompts, and for all of it."""
    model = abstract(config)
    parameters = random_parameters(model)
    shape = (size["batch_size"], size["prompt"])
    prompt = jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size)
    # Run once more, since the first run also loads what libraries of the device have.
    prefill = _seconds(programs[0], parameters, prompt, repeats + 1)
    whole = _seconds(programs[1], parameters, prompt, repeats)
    per_step = (whole - prefill) / (size["tokens"] - 1)
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    # A cache fills up: on average it holds the prompt and half of the tokens that are added.
    state = model.state_bytes(size["prompt"] + size["tokens"] // 2)
    floor = (2 * count + size["batch_size"] * state) / BANDWIDTH
    return {
        "model": name,
        "parameters": count,
        "state_bytes": model.state_bytes(size["prompt"] + size["tokens"]),
        "prefill_seconds": prefill,
        "seconds": whole,
        "tokens_per_second": size["batch_size"] * size["tokens"] / whole,
        "step_ms": 1e3 * per_step,
        # Weights and states read once; what of the states is also written comes on top.
        "step_floor_ms": 1e3 * floor,
        "floor_share": floor / per_step,
        "extra_bytes": programs[1].memory_analysis().temp_size_in_bytes,
    }


def _seconds(program: Any, parameters: Any, prompt: jax.Array, repeats: int) -> float:
    """The best of some runs."""
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        program(parameters, prompt).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    """Measures both models and writes the record."""
    # A cache of all streams is half of a GPU's memory: no pool may keep what the other model left.
    os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=_SIZES, default="1.3b")
    parser.add_argument("--repeats", type=int, default=1, help="runs, of which the best counts")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    size = _SIZES[arguments.size]
    models, rows = configs(size), []
    start = time.perf_counter()
    # Compiling takes as long as running.
    programs = compile_all(
        {
            (name, count): functools.partial(compiled, config, size, count)
            for name, config in models.items()
            for count in (1, size["tokens"])
        }
    )
    print(f"compiled after {time.perf_counter() - start:.0f} s", flush=True)
    for name, config in models.items():
        both = programs[name, 1], programs[name, size["tokens"]]
        rows.append(measure(name, config, size, both, arguments.repeats))
        print(json.dumps(rows[-1]), flush=True)
        save(arguments.out, "generation", size={**size}, rows=rows)
    based, softmax = (row["tokens_per_second"] for row in rows)
    print(f"BASED over softmax: {based / softmax:.1f} times the tokens a second")


if __name__ == "__main__":
    main()
