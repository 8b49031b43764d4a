"""Peers on torch, measured like ours: the same inputs, the same cotangent, the same clock."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch  # pyrefly: ignore[missing-import]  only here where a peer needs it

from experiments.benchmarks.base import Inputs
from experiments.benchmarks.measure import Program


def build(function: Callable[..., Any], inputs: Inputs, cotangent: jax.Array | None) -> Program:
    """A program that runs a torch function on copies of JAX arrays on the GPU."""
    backward = cotangent is not None
    tensors = {
        name: torch.from_dlpack(array).clone().requires_grad_(backward)
        for name, array in inputs.items()
    }
    pulled = torch.from_dlpack(cotangent).clone() if backward else None

    def compute() -> dict[str, torch.Tensor]:
        with torch.set_grad_enabled(backward):
            out = function(**tensors)
            out = out[0] if isinstance(out, tuple) else out
        if pulled is None:
            return {"out": out}
        gradients = torch.autograd.grad(out, list(tensors.values()), pulled)
        return {"out": out.detach()} | dict(zip(tensors, gradients, strict=True))

    def call() -> dict[str, torch.Tensor]:
        result = compute()
        torch.cuda.synchronize()
        return result

    def run() -> dict[str, jax.Array]:
        return {name: jnp.from_dlpack(x.contiguous()) for name, x in call().items()}

    call()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    held = sum(x.nbytes for x in call().values())
    temporary = torch.cuda.max_memory_allocated() - before - held

    def device_ms(calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            compute()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / calls

    return Program(run, call, max(temporary, 0), device_ms)
