"""The command line that every script shares, in T5X's manner.

    python -m experiments.train --gin_file=mqar/quick.gin --gin.TRAIN_STEPS=100 --run_dir=runs/x

Exit codes: 0 done, 1 the run failed, 2 a mistake in the command line, config or input, 130 Ctrl-C.
"""

import argparse
import difflib
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import lcattn
from experiments import gin_config, registry
from experiments.gin_config import UsageError
from lcattn.config import Config

OPERATIVE = "operative_config.gin"

_FILES = ("--gin_file", "--gin_files")
_BINDINGS = ("--gin_bindings",)


def main(run: Callable[..., Any], argv: Sequence[str] | None = None) -> int:
    """Parses the command line, prepares the run folder and calls `run`.

    Args:
      run: called with the arguments that gin gives and `run_dir`, a `Path`.
      argv: arguments, without the program's name. None: those of this process.

    Returns:
      The exit code.
    """
    registry.register_all()
    try:
        options = _parser(run).parse_args(_spell_out(sys.argv[1:] if argv is None else argv))
        if options.help:
            _print_help(run, options.gin_file)
            return 0
        prepared = gin_config.prepare(run, options.gin_file, options.gin_bindings)
        run_dir = options.run_dir or default_run_dir(run, options.gin_file)
        if not (run_dir / OPERATIVE).exists():
            _record(run_dir, prepared)
    except UsageError as error:
        return _fail(error, 2)
    try:
        run(**prepared.arguments, run_dir=run_dir)
        # Only now for a folder that held a run before: this one may have refused to continue it.
        _record(run_dir, prepared)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except OSError as error:
        return _fail(error, 1)
    except Exception as error:
        if not _is_ours(error):
            raise
        return _fail(error, 2 if isinstance(error, ValueError) else 1)
    return 0


def default_run_dir(run: Callable[..., Any], files: Sequence[str]) -> Path:
    """The run folder of a command that names none: `runs/` and the names of the config files."""
    names = [_config_name(Path(file)) for file in files]
    return Path("runs") / ("+".join(names) or run.__name__)


def _config_name(file: Path) -> str:
    resolved, root = file.resolve(), gin_config.CONFIGS
    if resolved.is_relative_to(root):
        return str(resolved.relative_to(root).with_suffix(""))
    return file.stem if file.is_absolute() else str(file.with_suffix(""))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}{_nearest_flag(message)} (see --help)")


def _parser(run: Callable[..., Any]) -> _Parser:
    module = inspect.getmodule(run)
    spec = getattr(module, "__spec__", None)
    parser = _Parser(
        prog=f"python -m {spec.name if spec else run.__module__}",
        usage="%(prog)s --gin_file=FILE ... [--gin.NAME=value ...] [--run_dir=DIR]",
        description=(inspect.getdoc(run) or "").partition("\n")[0],
        add_help=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-h", "--help", action="store_true", help="show this, and the macros of the given files")
    add(*_FILES, dest="gin_file", action="append", default=[], metavar="FILE",
        help="a gin config, here or in configs/; later ones win")  # fmt: skip
    add(*_BINDINGS, action="append", default=[], metavar="NAME=value",
        help="a binding, also spelled --gin.NAME=value; strings need no quotes")  # fmt: skip
    add("--run_dir", type=Path, metavar="DIR",
        help="where results go (default: runs/ and the name of the config)")  # fmt: skip
    return parser


def _spell_out(argv: Sequence[str]) -> list[str]:
    return [
        f"{_BINDINGS[0]}={word.removeprefix('--gin.')}" if word.startswith("--gin.") else word
        for word in argv
    ]


def _nearest_flag(message: str) -> str:
    flag = message.rpartition(" ")[2].partition("=")[0]
    close = difflib.get_close_matches(flag, [*_FILES, *_BINDINGS, "--run_dir", "--help"], n=1)
    return f"; did you mean {close[0]}?" if close and message.startswith("unrecognized") else ""


def _print_help(run: Callable[..., Any], files: Sequence[str]) -> None:
    print(_parser(run).format_help())
    for name, value in gin_config.macros(run, files).items():
        print(f"  --gin.{name}={value!r}")


def _record(run_dir: Path, prepared: gin_config.Prepared) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.gin").write_text(prepared.config)
        (run_dir / "arguments.json").write_text(arguments_json(prepared.arguments))
        (run_dir / OPERATIVE).write_text(prepared.operative)
    except OSError as error:
        raise UsageError(f"run_dir: cannot be written: {error}") from error


def arguments_json(arguments: Mapping[str, Any]) -> str:
    """All that a run was called with, down to defaults that gin's own record leaves out."""

    def encode(value: Any) -> Any:
        return value.to_dict() if isinstance(value, Config) else str(value)

    return json.dumps(arguments, indent=2, default=encode) + "\n"


def _is_ours(error: BaseException) -> bool:
    """Whether a `raise` of our own ended the run, in words meant for the user, and not a bug."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    in_our_code = any(Path(last.filename).is_relative_to(folder) for folder in _our_folders())
    return in_our_code and (last.line or "").startswith("raise ")


def _our_folders() -> tuple[Path, ...]:
    return Path(lcattn.__file__).parent, Path(__file__).parent


def _fail(error: object, code: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code
