"""N-gram heads as a layer: what followed the last n tokens before, mixed into the stream."""

import dataclasses
from typing import Any, no_type_check, override

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from lcattn import ops
from lcattn.errors import argument_error
from lcattn.nn.layers import projection
from lcattn.nn.mixer import MixerConfig, TokenMixer, check_stream
from lcattn.ops import checks
from lcattn.traits import Traits
from lcattn.typing import Array, Float, Hidden, Int, Positions, SegmentIds, Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class NGramHeadsConfig(MixerConfig):
    """N-gram heads (arXiv 2401.12973): the mean of what followed the same last n tokens.

    Attributes:
      orders: for each head its n, the number of tokens that have to match.
      include_self: whether a token may attend to itself, as in the paper's formula; False as in
        its code (see `lcattn.ops.ngram_attention`).
      implementation: passed to the op.
    """

    orders: tuple[int, ...] = (1, 2)
    include_self: bool = True
    implementation: str | None = None

    @override
    def validate(self) -> None:
        super().validate()
        if not self.orders or min(self.orders) < 1 or len(set(self.orders)) < len(self.orders):
            raise self.error("orders", "different whole numbers of at least 1")

    def make(self, rngs: nnx.Rngs) -> "NGramHeads":
        """Builds the mixer."""
        return NGramHeads(self, rngs)


@no_type_check  # JAX also fills it with shapes and specs
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NGramState:
    """The past, by position: all orders read the same.

    Attributes:
      x: inputs `[B,S,D]`.
      tokens: their tokens `[B,S]`.
      length: number of tokens seen, a scalar int32.
    """

    x: Float[Array, "B S D"]
    tokens: Int[Array, "B S"]
    length: Int[Array, ""]


class NGramHeads(TokenMixer):
    """`y = W0 x + sum over n of Wn (A(n) x)` with the matching matrices A(n) of the tokens.

    In a residual block, `h + y`, this is the published layer `h W1 + sum of A(n) h Wn` with W1 at
    the identity and the Wn small, but for the norm before it. It belongs after an early mixer.
    """

    op = "ngram_attention"
    time = "T·log T"

    def __init__(self, config: NGramHeadsConfig, rngs: nnx.Rngs):
        """Args: `config`, with its width set; `rngs`, for the parameters."""
        self.config = config
        width = config.require_width()
        self.out = projection(
            config, width * (1 + len(config.orders)), width, axes=("heads", "embed"), rngs=rngs,
            is_output=True,
        )  # fmt: skip

    @property
    def traits(self) -> Traits:
        """Causal, streaming; the sorted form is sub-quadratic."""
        return Traits(causal=True, streaming=True, subquadratic=True)

    @override
    def __call__(
        self,
        x: Hidden,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
        *,
        tokens: Tokens | None = None,
    ) -> Hidden:
        """Mixes whole sequences; `positions` do not matter."""
        del positions
        return self._mix(x, self._attend(x, _present(tokens), segment_ids=segment_ids))

    def init_state(self, batch_size: int, max_length: int, dtype=None) -> NGramState:
        """An empty past of `max_length` slots."""
        shape = (batch_size, max_length)
        dtype = dtype or self.config.dtype or "float32"
        return NGramState(
            x=jnp.zeros((*shape, self.config.require_width()), dtype),
            tokens=jnp.zeros(shape, jnp.int32),
            length=jnp.zeros((), jnp.int32),
        )

    @override
    def extend(
        self, x: Hidden, state: NGramState, *, tokens: Tokens | None = None
    ) -> tuple[Hidden, NGramState]:
        """Continues each stream.

        Raises:
          ValueError: if there are no tokens, the state holds another number of streams, or (outside
            `jit`) the tokens do not fit into it. Under `jit`, outputs past the end are NaN.
        """
        check_stream(x, state.x)
        T, slots = x.shape[1], state.x.shape[1]
        checks.check_room(T, slots, state.length)

        def written(cache: Array, new: Array) -> Array:
            new = new.astype(cache.dtype)
            return lax.dynamic_update_slice_in_dim(cache, new, state.length, axis=1)

        past, read = written(state.x, x), written(state.tokens, _present(tokens))
        heads = self._attend(past.astype(x.dtype), read, query_position=state.length, num_queries=T)
        heads = jnp.where(state.length + T > slots, jnp.nan, heads)
        return self._mix(x, heads), NGramState(past, read, state.length + T)

    def _attend(self, x: Array, tokens: Int[Array, "B S"], **options: Any) -> Array:
        config = self.config
        return ops.ngram_attention(
            x, tokens, orders=config.orders, include_self=config.include_self,
            implementation=config.implementation, **options,
        )  # fmt: skip

    def _mix(self, x: Hidden, heads: Float[Array, "B T O D"]) -> Hidden:
        every = jnp.concatenate([x[:, :, None], heads.astype(x.dtype)], axis=2)
        return self.out(every.reshape(*x.shape[:2], every.shape[2] * every.shape[3]))


def _present(tokens: Tokens | None) -> Tokens:
    if tokens is None:
        raise argument_error("tokens", "ids [B,T]: n-grams are of tokens, not of x", None)
    return tokens
