"""Configs: checked types and ranges, frozen and hashable values, JSON and back."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Literal

import pytest

from lcattn.config import Config
from lcattn.models import LMConfig
from lcattn.nn import (
    LinearAttentionConfig,
    ShortConvolutionConfig,
    SoftmaxAttentionConfig,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Config):
    """Some of every kind of field."""

    size: int = 1
    rate: float = 0.5
    names: tuple[str, ...] = ()
    kind: Literal["a", "b"] = "a"
    table: Mapping[str, int] = dataclasses.field(default_factory=dict)
    maybe: int | None = None
    flag: bool = False

    def validate(self):
        self.require_positive("size")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("size", "3", r"Settings.size: expected int, got '3' \(str\)"),
        ("size", 2.0, r"Settings.size: expected int, got 2.0 \(float\)"),
        ("size", True, r"Settings.size: expected int, got True \(bool\)"),
        ("size", 0, r"Settings.size: expected a value greater than 0, got 0"),
        ("kind", "c", r"Settings.kind: expected Literal\['a', 'b'\], got 'c'"),
        ("names", ("a", 1), r"Settings.names: expected tuple\[str, ...\]"),
        ("names", [*"abcdefgh", 1], r"Settings.names: expected tuple\[str, ...\]"),
        ("table", {"a": "b"}, r"Settings.table: expected"),
        ("table", {1: 1}, r"Settings.table: expected"),
        ("table", dict(zip("abcdefg", [*range(6), None], strict=True)), r"Settings.table"),
        ("flag", 1, r"Settings.flag: expected bool"),
    ],
)
def test_wrong_types_and_ranges_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{field: value})


def test_harmless_conversions():
    config = Settings(rate=1, names=["a", "b"], table={"a": 1})
    assert isinstance(config.rate, float)
    assert config.names == ("a", "b")
    assert hash(config) == hash(Settings(rate=1.0, names=("a", "b"), table={"a": 1}))


def test_a_config_cannot_change():
    config = Settings(table={"a": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.size = 2
    with pytest.raises(TypeError, match=r"config\.replace"):
        config.table["a"] = 2
    assert config.replace(size=2).size == 2
    with pytest.raises(ValueError, match=r"Settings\.size"):
        config.replace(size=-1)


MIXERS = {
    "linear": LinearAttentionConfig(num_heads=4, feature_dim=8),
    "sliding": SoftmaxAttentionConfig(num_heads=4, window=64, position_encoding="alibi"),
    "conv": ShortConvolutionConfig(kernel_size=4),
}


def test_a_nested_config_survives_json():
    config = LMConfig(
        vocab_size=256, width=32, num_layers=3, pattern=("conv", "linear", "sliding"), mixers=MIXERS
    )
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_stored_config_is_not_trusted():
    stored = Settings().to_dict()
    with pytest.raises(ValueError, match="Settings: expected only fields it has, got color"):
        Config.from_dict(stored | {"color": 1})
    with pytest.raises(ValueError, match="__config__: expected the path of an imported config"):
        Config.from_dict({"__config__": "os:system"})
    with pytest.raises(ValueError, match="config: expected a dictionary with the key"):
        Config.from_dict({"size": 1})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftmaxAttentionConfig(window=0), "SoftmaxAttentionConfig.window"),
        (lambda: SoftmaxAttentionConfig(position_encoding="sinus"), "position_encoding"),
        (lambda: SoftmaxAttentionConfig(num_heads=4, num_kv_heads=3), "a divisor of num_heads=4"),
        (lambda: SoftmaxAttentionConfig(width=30, num_heads=4), "a divisor of width=30"),
        (lambda: LinearAttentionConfig(feature_map="cosine"), "LinearAttentionConfig.feature_map"),
        (lambda: LinearAttentionConfig(dtype="bfloat17"), "dtype: expected the name of a float"),
        (lambda: LinearAttentionConfig(dtype="int32"), "dtype: expected the name of a float"),
        (lambda: ShortConvolutionConfig(kernel_size=0), "ShortConvolutionConfig.kernel_size"),
        (lambda: ShortConvolutionConfig(width=3, expand=1), "an even expand"),
    ],
)
def test_mixer_configs_name_what_does_not_fit(no_type_hook, make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_mixer_needs_a_width(no_type_hook):
    with pytest.raises(ValueError, match=r"LinearAttentionConfig\.width: expected the model width"):
        LinearAttentionConfig(num_heads=2).make(rngs=None)
