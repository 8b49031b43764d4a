"""Gin at arm's length: bindings in, checked arguments of a run out, mistakes in one line.

Gin binds only the arguments of a script's run function and the frozen config dataclasses passed to
it. Everything is built before the run starts, outside any jitted function, so three of gin's traps
cannot spring: a binding baked in at trace time, a wrong type carried along unseen, and a binding
that nothing reads.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib.util  # noqa: F401  gin uses it without importing it when a file is missing
import inspect
import logging
import re
import tokenize
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gin
from gin import config_parser

from lcattn.config import Config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

gin.add_config_file_search_path(str(CONFIGS))

# The parameters of each registered name, for suggestions.
_PARAMETERS: dict[str, tuple[str, ...]] = {}


class UsageError(Exception):
    """A mistake in the command line or in a config; its text is one line for the user."""


class Prepared(NamedTuple):
    """The arguments of a run, and the text of the config that gave them.

    Attributes:
      arguments: keyword arguments of the run function.
      config: the bindings as given, in gin's syntax.
      operative: every value in use, defaults included, in gin's syntax.
    """

    arguments: dict[str, Any]
    config: str
    operative: str


@functools.cache
def register(configurable: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a config class known to gin under its own name, leaving the class as it is."""
    _PARAMETERS[configurable.__name__] = tuple(inspect.signature(configurable).parameters)
    with gin.unlock_config():  # an earlier run of the same process may have finalized it
        return gin.external_configurable(configurable, module=configurable.__module__)


def prepare(run: Callable[..., Any], files: Sequence[str], bindings: Sequence[str]) -> Prepared:
    """Parses gin files and `NAME=value` bindings, and builds the arguments of `run`.

    Args:
      run: a function of keyword arguments with type annotations; gin knows it by its name. Its
        parameter `run_dir` is not gin's.
      files: paths, looked up in the current folder and in `configs/`; later ones win.
      bindings: `NAME=value`, parsed after the files; a value that is no gin literal is a string.

    Raises:
      UsageError: one line that names the place, the name and, where one is close, a suggestion.
    """
    arguments = register(_arguments_class(run))
    _parse(files, bindings)
    with _one_line_errors():
        gin.finalize()
        built = arguments()
    prepared = Prepared(
        {field.name: getattr(built, field.name) for field in dataclasses.fields(built)},
        gin.config_str(),
        gin.operative_config_str(),
    )
    _check_used(bindings, prepared)
    return prepared


def macros(run: Callable[..., Any], files: Sequence[str]) -> dict[str, Any]:
    """The macros that the given files define for `run`, with their values as gin prints them."""
    register(_arguments_class(run))
    _parse(files)
    return {s.selector: s.value for s in _bindings(gin.config_str()) if not s.arg_name}


def _parse(files: Sequence[str], bindings: Sequence[str] = ()) -> None:
    gin.clear_config()
    logging.disable(logging.ERROR)  # gin logs each folder in which a file was not found
    try:
        for file in files:
            with _one_line_errors(file):
                gin.parse_config_file(file)
        for binding in bindings:
            with _one_line_errors(f"--gin.{binding}"):
                gin.parse_config(statement(binding))
    finally:
        logging.disable(logging.NOTSET)


def statement(binding: str) -> str:
    """A gin statement from `NAME=value`, quoting the value if it is a bare string."""
    name, equals, value = binding.partition("=")
    if not (equals and name.strip()):
        raise UsageError(f"--gin.{binding}: expected --gin.NAME=value")
    return f"{name} = {value if _is_literal(value) else repr(value)}"


def _is_literal(value: str) -> bool:
    # What opens like a reference, a macro or a container was meant as one: gin names the mistake.
    if value.lstrip().startswith(("@", "%", "[", "(", "{", "'", '"')):
        return True
    try:
        return len(list(_statements(f"_ = {value}"))) == 1
    except (SyntaxError, tokenize.TokenError):
        return False


@functools.cache
def _arguments_class(run: Callable[..., Any]) -> type[Config]:
    """A config class with the parameters of `run`: their types are checked like any config's."""
    hints = typing.get_type_hints(run)
    fields = [
        (name, hints[name])
        if parameter.default is parameter.empty
        else (name, hints[name], dataclasses.field(default=parameter.default))
        for name, parameter in inspect.signature(run).parameters.items()
        if name != "run_dir"
    ]
    return dataclasses.make_dataclass(
        run.__name__, fields, bases=(Config,), frozen=True, kw_only=True, module="experiments"
    )


class _Verbatim(str):
    """Text of a reference or macro, printed without quotes."""

    def __repr__(self) -> str:
        return str(self)


class _KeepText(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Any:
        return _Verbatim(f"@{scoped_configurable_name}{'()' if evaluate else ''}")

    def macro(self, macro_name: str) -> Any:
        return _Verbatim(f"%{macro_name}")


def _statements(text: str) -> Iterator[Any]:
    return iter(config_parser.ConfigParser(text, _KeepText()))


def _bindings(text: str) -> Iterator[config_parser.BindingStatement]:
    return (s for s in _statements(text) if isinstance(s, config_parser.BindingStatement))


def _check_used(bindings: Iterable[str], prepared: Prepared) -> None:
    """Raises for a binding of the command line that had no effect, which gin would let pass."""
    used = [_key(s) for s in _bindings(prepared.operative)]
    for binding in bindings:
        [given] = _bindings(statement(binding))
        scope, name, parameter = _key(given)
        if any((name, parameter) == u[1:] and _covers(scope, u[0]) for u in used):
            continue
        if parameter:
            raise UsageError(f"--gin.{binding}: nothing in this run reads {name}.{parameter}")
        known = {_key(s)[1] for s in _bindings(prepared.operative) if not s.arg_name}
        raise UsageError(f"--gin.{binding}: no binding refers to %{name}{_suggest(name, known)}")


def _key(binding: config_parser.BindingStatement) -> tuple[str, str, str]:
    # A selector may be spelled with any part of its module path: the class name decides.
    return binding.scope, binding.selector.rpartition(".")[2], binding.arg_name


def _covers(scope: str, inner: str) -> bool:
    return not scope or f"{inner}/".startswith(f"{scope}/")


# What gin and the config classes raise for a mistake in a config; anything else is a bug of ours.
_GIN_ERRORS = (
    AttributeError, ImportError, NameError, OSError, RuntimeError, SyntaxError, TypeError,
    ValueError, tokenize.TokenError,
)  # fmt: skip


@contextlib.contextmanager
def _one_line_errors(place: str = "") -> Iterator[None]:
    """Turns what gin raises or wraps into one line: where, what is wrong, a suggestion."""
    try:
        yield
    except RecursionError:
        raise UsageError("a macro or reference in the config refers to itself") from None
    except _GIN_ERRORS as error:
        place, reason = _place(error) or place, _reason(error)
        is_said = reason.startswith(f"{place}: ")
        raise UsageError(reason if is_said or not place else f"{place}: {reason}") from error


def _place(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}" if error.filename else ""
    found = re.search(r'In file "([^"]+)", line (\d+)', str(error))
    return f"{found[1]}:{found[2]}" if found else ""


def _reason(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return _syntax(error)
    if isinstance(error, tokenize.TokenError):
        return "a bracket or a quote is not closed"
    text = re.split(r"\n  (?:In |No values supplied)", str(error))[0]
    for pattern, rewrite in _REWRITES:
        if found := re.search(pattern, text, re.DOTALL):
            return rewrite(*found.groups())
    return " ".join(text.split())


def _syntax(error: SyntaxError) -> str:
    if found := re.search(r"Failed to parse token '(.*)'", error.msg):
        return f"{found[1]}: not a gin value (in a file, strings need quotes)"
    line = (error.text or "").strip()
    return f"{error.msg.rstrip('.')}, in: {line}" if line else error.msg


def _no_name(name: str) -> str:
    return f"{name}: no such name{_suggest(name, _PARAMETERS)}"


def _no_parameter(name: str, parameter: str) -> str:
    known = _PARAMETERS.get(name.rpartition(".")[2], ())
    return f"{name}.{parameter}: no such parameter{_suggest(parameter, known)}"


def _no_file(file: str) -> str:
    known = [str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.gin")]
    return f"{file}: no such file, here or in configs/{_suggest(file, known)}"


def _required(name: str) -> str:
    name = re.sub(r"/(gin\.)?macro\.value$", "", name)
    return f"{name}: required; give it by --gin.{name}=..."


def _missing(name: str, parameters: str) -> str:
    return _required(f"{name}.{re.findall(r'\w+', parameters)[0]}")


def _no_macro(name: str) -> str:
    return f"%{name}: no such macro; define it by {name} = ..."


_REWRITES: tuple[tuple[str, Callable[..., str]], ...] = (
    (r"^No configurable matching (?:reference )?'@?(?:[\w/]*/)?([\w.]+?)(?:\(\))?'", _no_name),
    (r"^Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", _no_parameter),
    (r"^Unable to open file: (.*?)\. Searched", _no_file),
    (r"^(\S+) set to `%gin.REQUIRED`", _required),
    (r"^(\w+)(?:\.__init__)?\(\) missing \d+ required .*arguments?: (.*)", _missing),
    (r"^No bindings specified for '(.*?)/(?:gin\.)?macro'", _no_macro),
)


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
