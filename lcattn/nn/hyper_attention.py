"""HyperAttention as a token mixer: estimated in training and scoring, exact in streaming."""

import dataclasses
from typing import Any, override

import jax
import jax.numpy as jnp
from flax import nnx

from lcattn import ops
from lcattn.nn.attention import AttentionConfig, CachedAttention
from lcattn.ops.hyper_attention.hashing import most_projections
from lcattn.traits import Traits
from lcattn.typing import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class HyperAttentionConfig(AttentionConfig):
    """HyperAttention (arXiv 2310.05869): alike keys found by hashing, the others from a sample.

    Attributes:
      num_projections: hyperplanes of the hash; 7 as published, and at most 7 or, if that is more,
        log2 of `min_seq_len`.
      block_size: alike keys that a query reads; 256 as published.
      sample_size: keys that stand for the others; 256 as published.
      min_seq_len: the most tokens that are exact; 4096 as published.
      strict: what a query reads does not depend on later tokens. The published form is not strict.
    """

    num_projections: int = 7
    block_size: int = 256
    sample_size: int = 256
    min_seq_len: int = 4096
    strict: bool = True

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive("num_projections", "block_size", "sample_size", "min_seq_len")
        most = most_projections(self.min_seq_len)
        if self.num_projections > most:
            raise self.error("num_projections", f"at most {most}, by min_seq_len")
        if self.block_size > self.min_seq_len:
            raise self.error("block_size", f"at most min_seq_len={self.min_seq_len}")

    def make(self, rngs: nnx.Rngs) -> "HyperAttention":
        """Builds the mixer."""
        return HyperAttention(self, rngs)


class HyperAttention(CachedAttention[HyperAttentionConfig]):
    """`y = Wo · hyper_attention(rotate(Wq x), rotate(Wk x), Wv x)`, without biases.

    The parameters are those of `SoftmaxAttention`, whose checkpoints it can take. A layer keeps its
    hyperplanes. Samples are the same in every call, so that results can be repeated, but for
    training (`model.train()`, or `deterministic=False`), where each call draws new ones. Like the
    count of a dropout layer, the count of draws is a variable that a training step must carry on;
    `lcattn.training` does.

    `extend` is exact: one query would not pay for sorting its keys, and nothing was published for
    it. So a stream gives what the whole sequence gives up to `min_seq_len` tokens, and past that
    what it estimates.

    Attributes:
      planes: `[H,r]`, normals of the hyperplanes.
      samples: the stream of random keys that samples are drawn with.
      deterministic: False in training.
    """

    op = "hyper_attention"
    time = "T·(b + m)·log T"

    @override
    def __init__(self, config: HyperAttentionConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        shape = config.head_size, config.num_projections
        self.planes = nnx.BatchStat(jax.random.normal(rngs.params(), shape, jnp.float32))
        self.samples = nnx.RngStream(rngs.params(), tag="samples")
        self.deterministic = True

    @property
    def traits(self) -> Traits:
        """Causal if strict. A stream gives the exact result, not that of one call."""
        strict = self.config.strict
        return Traits(causal=strict, streaming=False, stochastic=True, subquadratic=True)

    @override
    def _attend(self, q: Array, k: Array, v: Array, **options: Any) -> Any:
        config = self.config
        if "query_position" in options:
            return ops.softmax_attention(q, k, v, implementation=config.implementation, **options)
        return ops.hyper_attention(
            q, k, v, self.planes[...],
            rng=self.samples.key[...] if self.deterministic else self.samples(),
            block_size=config.block_size, sample_size=config.sample_size,
            min_seq_len=config.min_seq_len, strict=config.strict,
            implementation=config.implementation, **options,
        )  # fmt: skip
