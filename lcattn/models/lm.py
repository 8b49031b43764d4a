"""The decoder language model: a repeated pattern of token mixers."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, override

import jax
import jax.numpy as jnp
from flax import nnx

from lcattn.config import Config
from lcattn.errors import argument_error
from lcattn.nn import MixerConfig, SwiGLU, TokenMixer
from lcattn.nn.layers import LayerConfig, layer_norm, rms_norm
from lcattn.nn.mixer import State
from lcattn.typing import Array, Hidden, Logits, Positions, PRNGKeyArray, SegmentIds, Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMConfig(Config):
    """A decoder language model.

    Attributes:
      vocab_size: number of tokens V.
      width: model width D.
      num_layers: number of blocks.
      pattern: names of mixers, repeated to `num_layers`: `("linear", "sliding")` alternates.
      mixers: what each name in the pattern stands for. Fields left at None (width, dtypes,
        `output_init_std`) are filled from the model.
      mlp_width: inner size of the SwiGLU after each mixer. None: 2·width rounded up to a multiple
        of 256. 0: no MLP.
      norm: "rms" or "layer", before each mixer and MLP and before the head.
      dropout: of the embeddings, where the model is called with an rng.
      dtype: compute dtype of layers; the residual stream and the logits are float32.
      param_dtype: dtype in which parameters are kept.
      init_std: standard deviation of the embeddings and projections; output projections use
        `init_std / sqrt(2 · num_layers)`.
      remat: recompute each block in the backward pass instead of keeping its activations.
    """

    vocab_size: int
    width: int
    num_layers: int
    pattern: tuple[str, ...]
    mixers: Mapping[str, MixerConfig]
    mlp_width: int | None = None
    norm: Literal["rms", "layer"] = "rms"
    dropout: float = 0.0
    dtype: str = "float32"
    param_dtype: str = "float32"
    init_std: float = 0.02
    remat: bool = False

    @override
    def validate(self) -> None:
        self.require_positive("vocab_size", "width", "num_layers", "init_std")
        if not self.pattern:
            raise self.error("pattern", "at least one name")
        unknown = sorted(set(self.pattern) - set(self.mixers))
        if unknown:
            raise self.error("pattern", f"names among {sorted(self.mixers)}")
        if self.mlp_width is not None and self.mlp_width < 0:
            raise self.error("mlp_width", "a size, or 0 for no MLP")
        if not 0 <= self.dropout < 1:
            raise self.error("dropout", "a probability below 1")
        for layer in range(self.num_layers):
            self.mixer_at(layer)

    def mixer_at(self, layer: int) -> MixerConfig:
        """The complete config of one layer's mixer."""
        config = self.mixers[self.pattern[layer % len(self.pattern)]]
        return config.inherit(self.layer)

    @property
    def layer(self) -> LayerConfig:
        """What all layers of the model share."""
        return LayerConfig(
            width=self.width,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            init_std=self.init_std,
            output_init_std=self.init_std * (2 * self.num_layers) ** -0.5,
        )

    @property
    def mlp_size(self) -> int:
        """Inner size of the MLP; 0 for none."""
        return -(-2 * self.width // 256) * 256 if self.mlp_width is None else self.mlp_width

    def make(self, rngs: nnx.Rngs) -> "LM":
        """Builds the model."""
        return LM(self, rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LMState:
    """The states of all mixers, in the order of the layers."""

    layers: tuple[State, ...]


class Block(nnx.Module):
    """`h += mixer(norm(h)); h += mlp(norm(h))`, with h in float32."""

    def __init__(self, config: LMConfig, layer: int, rngs: nnx.Rngs):
        """Args: the model's `config`, the index of the `layer`, `rngs` for the parameters."""
        make_norm = rms_norm if config.norm == "rms" else layer_norm
        self.norm = make_norm(config.width, dtype=config.dtype, rngs=rngs)
        self.mixer = config.mixer_at(layer).make(rngs)
        if config.mlp_size:
            self.mlp_norm = make_norm(config.width, dtype=config.dtype, rngs=rngs)
            self.mlp = SwiGLU(config.layer, config.mlp_size, rngs)
        else:
            self.mlp_norm = self.mlp = None

    def __call__(
        self,
        h: Hidden,
        segment_ids: SegmentIds | None,
        positions: Positions | None,
        tokens: Tokens | None = None,
    ) -> tuple[Hidden, dict[str, Array]]:
        """The stream after this block, and what the mixer and the MLP added to it."""
        mixed = self.mixer(self.norm(h), segment_ids, positions, **self._read(tokens))
        return self.finish(h, mixed)

    def extend(self, h: Hidden, state: State, tokens: Tokens | None = None) -> tuple[Hidden, State]:
        """Continues each stream."""
        mixed, state = self.mixer.extend(self.norm(h), state, **self._read(tokens))
        return self.finish(h, mixed)[0], state

    def _read(self, tokens: Tokens | None) -> dict[str, Any]:
        return {"tokens": tokens} if isinstance(self.mixer, TokenMixer) else {}

    def finish(self, h: Hidden, mixed: Hidden) -> tuple[Hidden, dict[str, Array]]:
        """The rest of the block, once its mixer's output `mixed` is known."""
        h = h + mixed
        added = {"mixer": mixed}
        if self.mlp is not None and self.mlp_norm is not None:
            added["mlp"] = self.mlp(self.mlp_norm(h))
            h = h + added["mlp"]
        return h, added


class LM(nnx.Module):
    """Token embedding, blocks, final norm, and a head tied to the embedding."""

    def __init__(self, config: LMConfig, rngs: nnx.Rngs):
        """Args: `config`; `rngs`, for the parameters."""
        self.config = config
        self.embedding = nnx.Embed(
            config.vocab_size,
            config.width,
            param_dtype=jnp.dtype(config.param_dtype),
            embedding_init=nnx.initializers.normal(config.init_std),
            embedding_metadata={"axes": ("vocab", "embed")},
            rngs=rngs,
        )
        self.blocks = nnx.List([Block(config, i, rngs) for i in range(config.num_layers)])
        make_norm = rms_norm if config.norm == "rms" else layer_norm
        self.norm = make_norm(config.width, dtype=config.dtype, rngs=rngs)

    def __call__(
        self,
        tokens: Tokens,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
        *,
        rng: PRNGKeyArray | None = None,
        capture: bool = False,
    ) -> Logits | tuple[Logits, dict[str, Array]]:
        """Scores the next token at every position.

        Args:
          tokens: `[B,T]`.
          segment_ids: document of each token, for packed rows.
          positions: position of each token; default: counted from 0 in each document.
          rng: key of the dropout; None: no dropout.
          capture: also return intermediates by name: "embedding", "block_{i}/mixer",
            "block_{i}/mlp" (what each added to the residual stream), "block_{i}" (the stream
            after the block) and "norm".

        Returns:
          Logits `[B,T,V]` in float32, or those and the intermediates.
        """
        h = self.embed(tokens)
        if rng is not None and self.config.dropout:
            kept = jax.random.bernoulli(rng, 1 - self.config.dropout, h.shape)
            h = jnp.where(kept, h / (1 - self.config.dropout), 0)
        logits, captured = self.score(h, segment_ids, positions, tokens=tokens)
        return (logits, captured) if capture else logits

    def embed(self, tokens: Tokens) -> Hidden:
        """Where the stream starts, `[B,T,D]` in float32."""
        self._check(tokens)
        return self.embedding.embedding[...][tokens].astype(jnp.float32)

    def score(
        self,
        embeddings: Hidden,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
        *,
        tokens: Tokens | None = None,
    ) -> tuple[Logits, dict[str, Array]]:
        """The model after its embedding: logits and intermediates, as named by `capture`.

        `tokens` are for mixers that read them (`lcattn.nn.TokenMixer`).
        """
        h, captured = embeddings, {"embedding": embeddings}
        run = nnx.remat(Block.__call__) if self.config.remat else Block.__call__
        for i, block in enumerate(self.blocks):
            h, added = run(block, h, segment_ids, positions, tokens)
            captured |= {f"block_{i}/{name}": value for name, value in added.items()}
            captured[f"block_{i}"] = h
        logits, captured["norm"] = self.unembed(h)
        return logits, captured

    def unembed(self, h: Hidden) -> tuple[Logits, Hidden]:
        """Logits from the stream after the last block, and its normed form."""
        h = self.norm(h)
        table = self.embedding.embedding[...].astype(h.dtype)
        return jnp.einsum("btd,vd->btv", h, table, preferred_element_type=jnp.float32), h

    def init_state(self, batch_size: int, max_length: int, dtype: Any = None) -> LMState:
        """The state before the first token; see `lcattn.nn.Mixer.init_state`."""
        states = (b.mixer.init_state(batch_size, max_length, dtype) for b in self.blocks)
        return LMState(tuple(states))

    def extend(self, tokens: Tokens, state: LMState) -> tuple[Logits, LMState]:
        """Continues each stream by `[B,T]` tokens; cut as you like, the logits are the same."""
        h, state = self.advance(tokens, state)
        return self.unembed(h)[0], state

    def advance(self, tokens: Tokens, state: LMState) -> tuple[Hidden, LMState]:
        """As `extend`, but with the stream after the last block in place of its logits.

        Who needs few of the logits, as of a prompt, calls `unembed` on their part of it.
        """
        if len(state.layers) != len(self.blocks):
            raise argument_error("state", f"{len(self.blocks)} layers", len(state.layers))
        h, layers = self.embed(tokens), []
        for block, layer in zip(self.blocks, state.layers, strict=True):
            h, layer = block.extend(h, layer, tokens)
            layers.append(layer)
        return h, LMState(tuple(layers))

    def state_bytes(self, length: int, dtype: Any = None) -> int:
        """Bytes of state of one stream of `length` tokens, over all layers."""
        return sum(block.mixer.state_bytes(length, dtype) for block in self.blocks)

    def _check(self, tokens: Tokens) -> None:
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise argument_error("tokens", "2 axes [B,T] with T > 0", f"shape {tokens.shape}")
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise argument_error("tokens", "an integer dtype", tokens.dtype)
