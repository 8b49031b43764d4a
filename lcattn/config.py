"""The base of every configuration: frozen, self-validating, and storable as JSON.

A configuration is a frozen dataclass that builds the thing it describes (`make`). It is what gin
binds, what a checkpoint stores and what an error message quotes. Gin checks no types, so the
dataclass does.
"""

import dataclasses
import importlib
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

from beartype.door import is_bearable

from lcattn.errors import argument_error

_TYPE_KEY = "__config__"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base class. Subclasses are `@dataclass(frozen=True, kw_only=True)` and override `validate`.

    Values are checked against the field annotations when the object is built. Harmless
    conversions are made first: an int becomes a float where the field asks for one, and lists and
    dicts become tuples and frozen dicts, because gin and JSON cannot spell the difference and
    because configs are hashable, to be static arguments of `jax.jit`.

    Raises:
      ValueError: naming `Class.field`, the expected type or range, and the value that came.
    """

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, self._fit(field.name, value, hints[field.name]))
        self.validate()

    def validate(self) -> None:
        """Checks ranges and combinations; called after the types were checked."""

    def error(self, field: str, expected: str) -> ValueError:
        """The error for a field of this config whose value does not fit."""
        return argument_error(
            f"{type(self).__name__}.{field}", expected, repr(getattr(self, field))
        )

    def require_positive(self, *fields: str) -> None:
        """Raises unless each named field is None or greater than zero."""
        for field in fields:
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise self.error(field, "a value greater than 0")

    def replace[C: "Config"](self: C, **changes: Any) -> C:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary from which `from_dict` rebuilds an equal config."""
        fields = {f.name: _encode(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {_TYPE_KEY: f"{type(self).__module__}:{type(self).__qualname__}", **fields}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Config":
        """Rebuilds the config that `to_dict` wrote.

        Raises:
          ValueError: if the dictionary names no config class of this library, or fields of an
            unknown name.
        """
        decoded = _decode(data)
        if not isinstance(decoded, Config):
            raise argument_error("config", f"a dictionary with the key {_TYPE_KEY!r}", dict(data))
        return decoded

    def _fit(self, name: str, value: Any, hint: Any) -> Any:
        for candidate in _conversions(value):
            if _matches(candidate, hint):
                return candidate
        raise argument_error(
            f"{type(self).__name__}.{name}", _spell(hint), f"{value!r} ({type(value).__name__})"
        )


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


class _FrozenDict(dict):
    """A dictionary that cannot change, and can therefore be hashed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a config cannot change; use config.replace(...)")

    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = update = __ior__ = _refuse

    def __reduce__(self):
        return _FrozenDict, (dict(self),)


def _frozen(value: Any) -> Any:
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, Mapping):
        return _FrozenDict({key: _frozen(item) for key, item in value.items()})
    return value


def _conversions(value: Any):
    yield _frozen(value)
    if isinstance(value, int) and not isinstance(value, bool):
        yield float(value)


def _matches(value: Any, hint: Any) -> bool:
    # bool is an int to Python; a flag where a number belongs is a mistake.
    if isinstance(value, bool) and hint is not Any and bool not in _alternatives(hint):
        return False
    options = (option for option in _alternatives(hint) if is_bearable(value, option))
    return any(_items_match(value, option) for option in options)


def _items_match(value: Any, hint: Any) -> bool:
    # Of a container, beartype looks at one random item; a config must not pass by luck.
    arguments = typing.get_args(hint)
    if isinstance(value, tuple) and arguments:
        is_fixed = typing.get_origin(hint) is tuple and arguments[-1] is not Ellipsis
        hints = arguments if is_fixed else arguments[:1] * len(value)
        return all(map(_matches, value, hints))
    if isinstance(value, Mapping) and arguments:
        pairs = (pair for item in value.items() for pair in zip(item, arguments, strict=True))
        return all(_matches(part, part_hint) for part, part_hint in pairs)
    return True


def _alternatives(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _spell(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _encode(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_encode(item) for item in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item) for item in value)
    if not isinstance(value, Mapping):
        return value
    fields = {key: _decode(item) for key, item in value.items() if key != _TYPE_KEY}
    if _TYPE_KEY not in value:
        return fields
    cls = _config_class(value[_TYPE_KEY])
    unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(cls)})
    if unknown:
        raise argument_error(cls.__name__, "only fields it has", f"{', '.join(unknown)}")
    return cls(**fields)


def _config_class(path: str) -> type[Config]:
    module, _, name = path.partition(":")
    # A file may name a class of this library, or of a module that the program imported itself;
    # nothing else is imported on the word of a file.
    if module.partition(".")[0] in ("lcattn", "experiments"):
        importlib.import_module(module)
    cls = getattr(sys.modules.get(module), name, None)
    if isinstance(cls, type) and issubclass(cls, Config):
        return cls
    raise argument_error(_TYPE_KEY, "the path of an imported config class", repr(path))
