"""Everything random of a call: hyperplanes, and which keys are sampled for whom."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcattn.errors import argument_error
from lcattn.ops import checks
from lcattn.ops.checks import Sizes
from lcattn.typing import Array, Float, Int, Key, PRNGKeyArray


class Draws(NamedTuple):
    """Hyperplanes `[F,r]` of the hash, and a key for the samples of each row and query head."""

    planes: Float[Array, "F r"]
    keys: Key[Array, "B N"]


def draw(rng: Array | None, planes: Array | None, *, sizes: Sizes, num_projections: int) -> Draws:
    """Checks what is given and draws what is not.

    Raises:
      ValueError: without an `rng`, or for arrays that do not fit.
    """
    if rng is None:
        raise argument_error("rng", "a JAX key, since some row may exceed min_seq_len", None)
    if not isinstance(rng, jax.Array):
        raise argument_error("rng", "a JAX key", repr(rng))
    if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        if rng.dtype != jnp.uint32 or rng.shape[-1:] != (2,):
            raise argument_error("rng", "a JAX key", f"{rng.dtype}{list(rng.shape)}")
        rng = jax.random.wrap_key_data(rng)
    checks.check_size("num_projections", num_projections)
    if planes is not None and (planes.ndim != 2 or planes.shape[0] != sizes.F or not planes.size):
        raise argument_error("planes", f"[F={sizes.F},r]", f"shape {planes.shape}")
    if rng.ndim:
        checks.check_shape("rng", rng, (sizes.B, sizes.N), "[] or [B,N]")
        if planes is None:
            raise argument_error("planes", "[F,r], since rng has a key a head", None)
        return Draws(planes, rng)
    plane_rng, rng = jax.random.split(rng)
    if planes is None:
        planes = jax.random.normal(plane_rng, (sizes.F, num_projections), jnp.float32)
    # Row first, then head: a row's draws do not depend on how many others there are.
    rows = _fold(rng, sizes.B)
    return Draws(planes, jax.vmap(lambda row: _fold(row, sizes.N))(rows))


def _fold(key: Array, count: int) -> Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count, dtype=jnp.uint32))


def sample(
    key: PRNGKeyArray, draw_id: Int[Array, ""] | int, population: Int[Array, ""] | int, count: int
) -> Int[Array, "m"]:
    """`count` numbers below `population`, each uniform and independent of the others."""
    uniform = jax.random.uniform(jax.random.fold_in(key, draw_id), (count,), jnp.float32)
    # Rounding may bring the product up to the population itself.
    drawn = (uniform * jnp.float32(population)).astype(jnp.int32)
    return jnp.clip(drawn, 0, jnp.maximum(population - 1, 0))
