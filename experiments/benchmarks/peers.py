"""Other libraries' implementations, where they are installed."""

import importlib
import importlib.util
from types import ModuleType

import jax

from experiments.benchmarks.base import Implementation


def softmax_attention(*, window: int | None) -> dict[str, Implementation]:
    """Peers for exact causal attention."""
    found: dict[str, Implementation] = {}
    if (tokamax := _installed("tokamax")) and window is None and jax.default_backend() != "cpu":
        found["tokamax"] = Implementation(
            lambda q, k, v: tokamax.dot_product_attention(q, k, v, is_causal=True)
        )
    if (torch := _cuda_torch()) and window is None:
        sdpa = torch.nn.functional.scaled_dot_product_attention

        def flash(q, k, v):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return sdpa(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

        found["torch sdpa"] = Implementation(flash, framework="torch")
    return found


def linear_attention(*, feature_map: str) -> dict[str, Implementation]:
    """Peers for causal linear attention: flash-linear-attention on torch."""
    if not (_cuda_torch() and _installed("fla")):
        return {}
    if feature_map == "taylor":
        based = importlib.import_module("fla.ops.based")
        return {
            f"fla {name}": Implementation(getattr(based, f"{name}_based"), framework="torch")
            for name in ("parallel", "fused_chunk")
        }
    if feature_map == "identity":
        fla = importlib.import_module("fla.ops.linear_attn")

        def chunked(q, k, v):
            return fla.chunk_linear_attn(q, k, v, normalize=False)[0]

        return {"fla chunk": Implementation(chunked, framework="torch")}
    return {}


def gated_linear_attention(*, decay: str) -> dict[str, Implementation]:
    """Peers for decays of every channel (GLA): flash-linear-attention on torch."""
    if decay != "channel" or not (_cuda_torch() and _installed("fla")):
        return {}
    fla = importlib.import_module("fla.ops.gla")

    def chunked(q, k, v, log_decay):
        return fla.chunk_gla(q, k, v, log_decay)[0]

    return {"fla chunk": Implementation(chunked, framework="torch")}


def _installed(name: str) -> ModuleType | None:
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def _cuda_torch() -> ModuleType | None:
    torch = _installed("torch")
    return torch if torch is not None and torch.cuda.is_available() else None
