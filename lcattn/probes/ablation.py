"""Models without some of their heads."""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx

from lcattn.errors import argument_error
from lcattn.models import LM
from lcattn.nn import HeadsMixer
from lcattn.probes.attention import heads_mixer
from lcattn.typing import Array, Float, Logits, Tokens

Kept = Mapping[int, Float[Array, "N"]]
"""By layer: 1 for each head that stays, 0 for each that is taken out. Other layers stay whole."""


def keep_heads(model: LM, kept: Kept) -> LM:
    """A copy of a model in which some heads add nothing to the stream.

    The rows of the output projection that read a head are scaled by `kept`, which may be traced, so
    that one compiled program serves every choice of heads. Works for every mixer with heads.
    """
    copy = nnx.clone(model)
    for layer, mask in kept.items():
        mixer = _mixer(copy, layer, mask)
        config, kernel = mixer.config, mixer.out.kernel
        rows = kernel[...].reshape(config.num_heads, config.head_size, -1)
        scaled = rows * mask[:, None, None].astype(rows.dtype)
        kernel[...] = scaled.reshape(kernel[...].shape)
    return copy


def with_patterns(
    model: LM, tokens: Tokens, patterns: Mapping[int, Float[Array, "B N T T"]], kept: Kept
) -> Logits:
    """The logits of a model whose attention is given and some of whose heads add nothing.

    With the patterns of the whole model (`attention_maps`), a head that is taken out changes what
    later heads bring (V-composition), but not where they look (Q- and K-composition): the
    "pattern-preserving ablation" of Olsson et al. (2022), arXiv 2209.11895.

    Args:
      model: its layers named in `patterns` are plain attention: `y = Wo (pattern · Wv x)`.
      tokens: `[B,T]`.
      patterns: attention maps by layer.
      kept: heads that stay, by layer.
    """
    model = keep_heads(model, kept)
    h = model.embed(tokens)
    for layer, block in enumerate(model.blocks):
        if layer not in patterns:
            h, _ = block(h, None, None, tokens)
            continue
        mixer = _mixer(model, layer, patterns[layer][0, :, 0, 0])
        x = block.norm(h)
        v = mixer.project(x)[2]
        v = jnp.repeat(v, mixer.config.num_heads // mixer.config.kv_heads, axis=2)
        heads = jnp.einsum("bnts,bsnh->btnh", patterns[layer].astype(v.dtype), v)
        h, _ = block.finish(h, mixer.project_out(heads))
    return model.unembed(h)[0]


def _mixer(model: LM, layer: int, mask: Array) -> HeadsMixer:
    """The mixer of a layer, which has as many heads as the mask."""
    mixer = heads_mixer(model, layer)
    if mask.shape != (mixer.config.num_heads,):
        raise argument_error(f"layer {layer}", f"{mixer.config.num_heads} heads", mask.shape)
    return mixer
