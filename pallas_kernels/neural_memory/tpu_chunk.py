r"""One chunk of one memory: the arithmetic that both sweeps share, on tiles `[C, size]`.

The gradients of a chunk are all taken at one network, the anchor V_1 ... V_L. With X_l the inputs
of its layers for the keys, and E_l the gradients of |M(k) - v|² with respect to their outputs, the
gradient of a token's loss with respect to a layer is the outer product of its rows of X_l and E_l:

    X_1 = K,  X_(l+1) = σ(Z_l),  Z_l = X_l V_l
    E_L = 2 (Z_L - V),  E_l = (E_(l+1) V_(l+1)ᵀ) σ'(Z_l)

Queries Y_1 = Q pass each layer at weights of their own each, which are never formed, and the chunk
leaves its last token's:

    b (Y_l W_l) + f (Y_l S_l) - ((Y_l X_lᵀ) G) E_l,   Y_(l+1) = σ of it
    W_l' = b_C W_l + f_C S_l - (G_C X_l)ᵀ E_l,        S_l' = m_C S_l - (P_C θ X_l)ᵀ E_l

with b, f, G, m, P of `tpu_gates`. The backward sweep takes `jax.vjp` of this very code while the
kernel is traced, second derivative of σ included.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.neural_memory.tpu_gates import Coefficients, Gates, coefficients
from pallas_kernels.tpu_products import product

Layers = tuple[jax.Array, ...]
"""A matrix `[in,out]` a layer, in float32."""


class Memory(NamedTuple):
    """A network and its momentum."""

    weights: Layers
    momentum: Layers


class Surprise(NamedTuple):
    """Gradients as factors: inputs `[C,in]` of each layer, and errors `[C,out]`."""

    inputs: Layers
    errors: Layers


class Chunk(NamedTuple):
    """What a chunk brings: queries of each head that reads the memory, keys, values, and gates."""

    q: tuple[jax.Array, ...]
    k: jax.Array
    v: jax.Array
    gates: Gates


class Arithmetic(NamedTuple):
    """How a chunk is computed.

    Attributes:
      activate: σ, element-wise.
      dtype: of the operands of products; sums are float32.
    """

    activate: Callable[[jax.Array], jax.Array]
    dtype: jnp.dtype

    def advance(
        self, memory: Memory, anchor: Layers, chunk: Chunk, used: jax.Array, first: jax.Array
    ) -> tuple[Memory, tuple[jax.Array, ...]]:
        """The memory after a chunk, and the answers to its queries; marks as for `coefficients`."""
        coefs = coefficients(chunk.gates, used, first, self.dtype)
        surprise = self.surprise(chunk.k, chunk.v, anchor)
        answers = tuple(self.read(q, memory, surprise, coefs) for q in chunk.q)
        return self.write(memory, surprise, coefs), answers

    def surprise(self, k: jax.Array, v: jax.Array, anchor: Layers) -> Surprise:
        """What keys and values do to a network, all at the same weights."""
        x, inputs, pulls = k, [k], []
        for layer in anchor[:-1]:
            x, pull = jax.vjp(self.activate, self._product(x, layer))
            inputs.append(x)
            pulls.append(pull)
        error = 2 * (self._product(x, anchor[-1]) - v)
        errors = [error]
        for layer, pull in zip(anchor[:0:-1], pulls[::-1], strict=True):
            (error,) = pull(self._product(error, layer, (1, 1)))
            errors.append(error)
        return Surprise(tuple(inputs), tuple(errors[::-1]))

    def read(
        self, q: jax.Array, memory: Memory, surprise: Surprise, coefs: Coefficients
    ) -> jax.Array:
        """The answer to each query `[C,F]`, after its token's write."""
        x = q
        for layer, parts in enumerate(zip(*memory, *surprise, strict=True)):
            weights, momentum, inputs, errors = parts
            if layer:
                x = self.activate(x)
            scores = coefs.written * self._product(x, inputs, (1, 1))
            x = (
                coefs.kept * self._product(x, weights)
                + coefs.carried * self._product(x, momentum)
                - self._product(scores, errors)
            )
        return x

    def write(self, memory: Memory, surprise: Surprise, coefs: Coefficients) -> Memory:
        """The memory after the chunk."""
        weights, momentum = [], []
        for w, s, inputs, errors in zip(*memory, *surprise, strict=True):
            written, pending = (
                self._product(inputs, share * errors, (0, 0))
                for share in (coefs.last_written, coefs.pending)
            )
            weights.append(coefs.last_kept * w + coefs.last_carried * s - written)
            momentum.append(coefs.momentum * s - pending)
        return Memory(tuple(weights), tuple(momentum))

    def _product(self, a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
        return product(a, b, contract, self.dtype)
