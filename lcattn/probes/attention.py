"""What attention maps show: induction, previous-token, duplicate-token and copying heads.

Maps are `[B,N,T,T]` with readers as rows, as `attention_maps` takes them from a model. Every mixer
whose op is linear in its values has one (`lcattn.nn.Mixer.attention_map`): for softmax they are its
probabilities; for linear attention, decaying states and the delta rule the weight with which a
value is in what is read, which may be negative. Scores are means over the batch, `[N]` in float32.

Source: Olsson, Elhage, Nanda et al., "In-context Learning and Induction Heads" (2022), arXiv
2209.11895. The paper describes prefix matching as attention to tokens "that preceded" the current
one in earlier repeats; what its text means, and `offset=1` measures, is the token *after* each
earlier copy, which is the one to predict.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcattn.errors import argument_error
from lcattn.models import LM
from lcattn.nn import HeadsMixer
from lcattn.typing import Array, Bool, Float, Int, Tokens

Maps = Float[Array, "B N T T"]


class HeadScores(NamedTuple):
    """A score for each head.

    Attributes:
      value: `[N]` float32; 0 where nothing was counted.
      count: how many rows of the maps it is a mean of.
    """

    value: Float[Array, "N"]
    count: Float[Array, ""]


def layer_inputs(model: LM, tokens: Tokens) -> list[Float[Array, "B T D"]]:
    """What the mixer of each layer reads: the stream before it, normed."""
    _, captured = model(tokens, capture=True)
    streams = [captured["embedding"], *(captured[f"block_{i}"] for i in range(len(model.blocks)))]
    return [block.norm(h) for block, h in zip(model.blocks, streams, strict=False)]


def attention_maps(model: LM, tokens: Tokens) -> dict[int, Maps]:
    """The attention maps of a model, by layer; layers whose mixer has none are left out."""
    maps = {}
    for i, (block, x) in enumerate(zip(model.blocks, layer_inputs(model, tokens), strict=True)):
        found = block.mixer.attention_map(x)
        if found is not None:
            maps[i] = found.astype(jnp.promote_types(found.dtype, jnp.float32))
    return maps


def as_shares(maps: Maps) -> Maps:
    """Absolute weights, each row divided by its sum: what makes maps of all mechanisms comparable.

    Weights of a state may be negative or large, since a norm follows. Rows of softmax stay as they
    are, rows of nothing stay 0.
    """
    weights = jnp.abs(maps)
    total = weights.sum(axis=-1, keepdims=True)
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 0)


def earlier_copies(tokens: Tokens) -> Bool[Array, "B T T"]:
    """Whether token j is an earlier copy of token i, `[b, i, j]`."""
    T = tokens.shape[1]
    return (tokens[:, :, None] == tokens[:, None, :]) & jnp.tri(T, k=-1, dtype=bool)


def prefix_matching(maps: Maps, tokens: Tokens, *, offset: int = 1) -> HeadScores:
    """Attention to the tokens `offset` places after the earlier copies of the current one.

    Averaged over the tokens that have earlier copies: in a block of r distinct tokens repeated R
    times, those of repeats 2 to R. 1 is the score of a perfect induction head.
    """
    copies = earlier_copies(tokens)
    return _mass(maps, _shifted(copies, offset), copies.any(axis=-1))


def duplicate_token(maps: Maps, tokens: Tokens) -> HeadScores:
    """Attention to the earlier copies of the current token, where there are any."""
    return prefix_matching(maps, tokens, offset=0)


def previous_token(maps: Maps) -> HeadScores:
    """Attention to the token before, over all tokens but the first."""
    B, _, T, _ = maps.shape
    before = jnp.broadcast_to(jnp.eye(T, k=-1, dtype=bool), (B, T, T))
    return _mass(maps, before, before.any(axis=-1))


def copying(model: LM, tokens: Tokens) -> dict[int, Float[Array, "N"]]:
    """How much the heads of each layer raise the logit of a token that they attend to.

    The value of each token goes through the head's output and straight to the unembedding (the
    final norm's scale included). Over the tokens of its row, logits are centred and cut off below
    0; the score is the share of the token's own, scaled from [0, 1] to [-1, 1]. A convolution, norm
    or gate of heads is not part of this path.

    Args:
      model: layers without heads are left out.
      tokens: `[B,T]`, different ones in each row; the paper takes 25 random ones.
    """
    scale = getattr(model.norm, "scale", None)
    table = model.embedding.embedding[...][tokens]
    table = table if scale is None else table * scale[...]
    scores = {}
    for i, (block, x) in enumerate(zip(model.blocks, layer_inputs(model, tokens), strict=True)):
        if not isinstance(block.mixer, HeadsMixer):
            continue
        logits = jnp.einsum("bsnd,btd->bnst", value_outputs(block.mixer, x), table)
        raised = jax.nn.relu(logits - logits.mean(axis=-1, keepdims=True))
        own = jnp.diagonal(raised, axis1=-2, axis2=-1)
        total = raised.sum(axis=-1)
        share = jnp.where(total > 0, own / jnp.where(total > 0, total, 1), 0)
        scores[i] = 2 * share.mean(axis=(0, 2)) - 1
    return scores


def value_outputs(mixer: HeadsMixer, x: Float[Array, "B T D"]) -> Float[Array, "B T N D"]:
    """What each head adds to the stream where it attends to one token alone."""
    config = mixer.config
    values = mixer.split(mixer.query(x), mixer.key(x), mixer.value(x))[2]
    values = jnp.repeat(values, config.num_heads // config.kv_heads, axis=2)
    out = mixer.out.kernel[...].reshape(config.num_heads, config.head_size, -1)
    return jnp.einsum("btnh,nhd->btnd", values, out)


def k_composition(model: LM, early: int, late: int) -> Float[Array, "N N"]:
    """Whether keys of one layer match what heads of an earlier one bring: `[early, late]` heads.

    The trace of `W_E W_Q W_K' W_O' W_V' W_E'`, with tokens as rows: how well a token queries for
    itself, as an earlier head brought it to another place. Random heads give a trace around 0,
    induction heads a large one for the previous-token head that they read. Norms and rotations are
    left out. Weigh its rows by `previous_token` scores and sum, for one number a head.

    Raises:
      ValueError: unless both layers have heads and one is below the other.
    """
    if not 0 <= early < late < len(model.blocks):
        raise argument_error("early, late", "0 <= early < late < layers", f"{early}, {late}")
    below, above = heads_mixer(model, early), heads_mixer(model, late)
    table = model.embedding.embedding[...][None]  # as one row of all tokens
    q, _, _ = above.split(above.query(table), above.key(table), above.value(table))
    brought = value_outputs(below, table)[0].swapaxes(0, 1)  # [n,V,D]
    _, k, _ = above.split(above.query(brought), above.key(brought), above.value(brought))
    k = jnp.repeat(k, above.config.num_heads // above.config.kv_heads, axis=2)
    return jnp.einsum("vlf,evlf->el", q[0], k)


def heads_mixer(model: LM, layer: int) -> HeadsMixer:
    """The mixer of a layer that has heads.

    Raises:
      ValueError: if the layer does not exist or has none.
    """
    if not 0 <= layer < len(model.blocks):
        raise argument_error("layer", f"0 to {len(model.blocks) - 1}", layer)
    mixer = model.blocks[layer].mixer
    if not isinstance(mixer, HeadsMixer):
        raise argument_error(f"layer {layer}", "a mixer with heads", type(mixer).__name__)
    return mixer


def _shifted(copies: Bool[Array, "B T T"], offset: int) -> Bool[Array, "B T T"]:
    """The places `offset` after those marked in each row, none of them after the reader."""
    T = copies.shape[-1]
    places: Int[Array, T] = jnp.arange(T) - offset
    shifted = jnp.where((places >= 0) & (places < T), copies[..., places % T], False)
    return shifted & jnp.tri(T, dtype=bool)


def _mass(maps: Maps, places: Bool[Array, "B T T"], rows: Bool[Array, "B T"]) -> HeadScores:
    """Attention to the marked places, averaged over the marked rows."""
    mass = jnp.einsum("bnts,bts->bnt", maps.astype(jnp.float32), places.astype(jnp.float32))
    count = rows.sum().astype(jnp.float32)
    total = (mass * rows[:, None]).sum(axis=(0, 2))
    return HeadScores(total / jnp.maximum(count, 1), count)
