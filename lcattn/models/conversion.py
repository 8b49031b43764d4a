"""Softmax layers of a trained language model turned into other mechanisms, without training."""

import dataclasses
from collections.abc import Mapping, Sequence

from flax import nnx

from lcattn.errors import argument_error
from lcattn.models.lm import LM, LMConfig
from lcattn.nn import MixerConfig, SoftmaxAttentionConfig
from lcattn.nn.attention import AttentionConfig
from lcattn.nn.heads import HeadsConfig


def convert(
    model: LM, mixer: HeadsConfig, *, layers: Sequence[int] | None = None, rngs: nnx.Rngs
) -> LM:
    """A model in which layers of softmax attention have become layers of another mechanism.

    Parameters keep their values: what a softmax layer has (projections, norms of queries and keys)
    goes to the same names of the new mixer, whose own parameters start as its config says. What the
    model then computes depends on the mechanism::

        selective_attention     the same at its defaults: a = 0, gates closed
        core_context_attention  the same while a sequence fits `window`
        hyper_attention         the same up to `min_seq_len` tokens, an estimate of it beyond
        softmax_attention       the same while a sequence fits `window`
        softplus_attention      something else: trained scores mean less to it; tune it
        linear_attention        something else, as above

    Args:
      model: the trained model. It is left as it is; the new one shares its arrays.
      mixer: what layers become. Its heads, width, dtypes and positions are taken from the layer
        that it replaces; its other fields count.
      layers: which layers, counted from 0. None: all of softmax attention without a window.
      rngs: for parameters that the layers did not have.

    Raises:
      ValueError: as `converted_config` does.
    """
    converted = converted_config(model.config, mixer, layers).make(rngs)
    trained = dict(nnx.to_flat_state(nnx.state(model)))
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(converted)) if path in trained]
    nnx.update(converted, nnx.from_flat_state([(path, trained[path]) for path in paths]))
    return converted


def converted_config(
    config: LMConfig, mixer: HeadsConfig, layers: Sequence[int] | None = None
) -> LMConfig:
    """The config of what `convert` makes of a model.

    Raises:
      ValueError: if `layers` names a layer that is not there, or not of softmax attention; if the
        mechanism has no heads, cannot encode positions as the layer does, has no room for one of
        its parameters, or cannot have its window.
    """
    if not isinstance(mixer, HeadsConfig):
        raise argument_error("mixer", "the config of a mixer with heads", type(mixer).__name__)
    names = [config.pattern[i % len(config.pattern)] for i in range(config.num_layers)]
    mixers = dict(config.mixers)
    for layer in _convertible(config) if layers is None else layers:
        if not 0 <= layer < config.num_layers:
            raise argument_error("layers", f"numbers in [0, {config.num_layers})", layer)
        source = mixers[names[layer]]
        if type(source) is not SoftmaxAttentionConfig:
            got = f"layer {layer}, of {type(source).__name__}"
            raise argument_error("layers", "layers of softmax attention", got)
        names[layer] += " converted"
        mixers[names[layer]] = _in_place_of(source, mixer)
    result = config.replace(
        pattern=tuple(names), mixers={name: mixers[name] for name in dict.fromkeys(names)}
    )
    for layer in range(config.num_layers):
        _check_parameters(config.mixer_at(layer), result.mixer_at(layer))
    return result


def _convertible(config: LMConfig) -> list[int]:
    """The layers of softmax attention over all past tokens."""
    found = []
    for layer in range(config.num_layers):
        mixer = config.mixer_at(layer)
        if type(mixer) is SoftmaxAttentionConfig and mixer.window is None:
            found.append(layer)
    if not found:
        raise argument_error(
            "model", "a layer of softmax attention without a window", f"{', '.join(config.pattern)}"
        )
    return found


def _in_place_of(source: SoftmaxAttentionConfig, mixer: HeadsConfig) -> HeadsConfig:
    """The mixer's config with the sizes and positions that the source's parameters were trained in.

    `implementation` stays the mixer's: names of implementations belong to an op.
    """
    known = {field.name for field in dataclasses.fields(mixer)}
    shared = {field.name for field in dataclasses.fields(AttentionConfig)} - {"implementation"}
    kept = {name: getattr(source, name) for name in shared & known}
    if source.window is not None:
        if not isinstance(mixer, SoftmaxAttentionConfig):
            raise argument_error(
                "layers", f"no layer with a window, for {type(mixer).__name__}", source.window
            )
        kept["window"] = mixer.window or source.window
    return mixer.replace(**kept)


def _check_parameters(source: MixerConfig, mixer: MixerConfig) -> None:
    """Raises unless each parameter of the source has its place, of its shape, in the mixer."""
    shapes = _shapes(mixer)
    for name, shape in _shapes(source).items():
        if shapes.get(name) != shape:
            got = f"{shapes[name]} in {type(mixer).__name__}" if name in shapes else "no such one"
            raise argument_error("mixer", f"a parameter {name} {shape}, as in the layer", got)


def _shapes(config: MixerConfig) -> Mapping[str, tuple[int, ...]]:
    params = nnx.eval_shape(lambda: nnx.state(config.make(nnx.Rngs(0)), nnx.Param))
    return {".".join(map(str, path)): p.shape for path, p in nnx.to_flat_state(params)}
