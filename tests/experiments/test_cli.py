"""The command line: what it accepts, what it records, and one clear line for every mistake."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import cli, gin_config
from lcattn.config import Config
from lcattn.errors import argument_error


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlantConfig(Config):
    height: int
    growth: float = 0.1
    name: str = "fern"
    leaves: tuple[int, ...] = (1,)
    evergreen: bool = False

    def validate(self) -> None:
        self.require_positive("height")


gin_config.register(PlantConfig)

_CALLS = []


def grow(*, plant: PlantConfig, days: int = 3, run_dir: Path) -> None:
    """Grows a plant.

    More than one line.
    """
    _CALLS.append((plant, days, run_dir))
    if days == 13:
        raise argument_error("days", "a lucky number", days)
    if days == 14:
        raise KeyboardInterrupt
    if days == 15:
        Path(run_dir / "absent").read_text()
    if days == 16:
        int("a bug")


BASE = "PlantConfig.growth = 3e-4\n"
FILE = """
HEIGHT = 4
DAYS = %gin.REQUIRED
include "base.gin"
grow.plant = @PlantConfig()
grow.days = %DAYS
PlantConfig.height = %HEIGHT
"""


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Runs `grow` in a folder with two configs; gives the code, the calls made and stderr."""
    (tmp_path / "base.gin").write_text(BASE)
    (tmp_path / "plant.gin").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    _CALLS.clear()

    def run(*argv):
        code = cli.main(grow, argv)
        return code, list(_CALLS), capsys.readouterr().err

    return run


def test_files_bindings_and_run_folder(call, tmp_path):
    code, calls, err = call("--gin_file=plant.gin", "--gin.DAYS=2", "--run_dir=out")
    assert (code, err) == (0, "")
    plant = PlantConfig(height=4, growth=3e-4)
    assert calls == [(plant, 2, Path("out"))]
    assert type(calls[0][0]) is PlantConfig
    operative = (tmp_path / "out/operative_config.gin").read_text()
    assert "PlantConfig.leaves = (1,)" in operative  # a default in use
    given = (tmp_path / "out/config.gin").read_text()
    assert "PlantConfig.leaves" not in given
    assert "DAYS = 2" in given
    arguments = json.loads((tmp_path / "out/arguments.json").read_text())
    assert Config.from_dict(arguments["plant"]) == plant


def test_operative_config_is_a_config_of_the_same_run(call):
    call("--gin_file=plant.gin", "--gin.DAYS=2", "--run_dir=out")
    _, calls, _ = call("--gin_file=out/operative_config.gin", "--run_dir=again")
    assert calls[0][:2] == calls[1][:2]


def test_later_wins(call, tmp_path):
    (tmp_path / "more.gin").write_text("HEIGHT = 5\nDAYS = 1\n")
    _, calls, _ = call(
        "--gin_bindings=DAYS=7", "--gin_file=plant.gin", "--gin_files=more.gin", "--gin.DAYS=8"
    )
    assert (calls[0][0].height, calls[0][1]) == (5, 8)


def test_default_run_folder(call, tmp_path):
    call("--gin_file=plant.gin", "--gin_file=base.gin", "--gin.DAYS=1")
    assert (tmp_path / "runs/plant+base/operative_config.gin").exists()


def test_default_run_folder_of_a_shipped_config():
    assert cli.default_run_dir(grow, [str(gin_config.CONFIGS / "lm/tiny.gin")]) == Path(
        "runs/lm/tiny"
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("foo", "foo"),
        ("'foo'", "foo"),
        ("runs/x y.txt", "runs/x y.txt"),
        ("2026-11-22", "2026-11-22"),
        ("10k", "10k"),
        ("it's", "it's"),
        ("", ""),
        ("a=b", "a=b"),
        ("@home", None),  # a reference, never a string
    ],
)
def test_bare_strings(call, text, value):
    code, calls, err = call(
        "--gin_file=plant.gin", "--gin.DAYS=1", f"--gin.PlantConfig.name={text}"
    )
    if value is None:
        assert code == 2
        assert "home: no such name" in err
    else:
        assert code == 0, err
        assert calls[0][0].name == value


@pytest.mark.parametrize(
    ("parameter", "text", "value"),
    [
        ("growth", "1e-3", 1e-3),
        ("growth", "-2", -2.0),
        ("height", "10_000", 10_000),
        ("evergreen", "True", True),
        ("leaves", "[1, 2]", (1, 2)),
        ("leaves", "(3,)", (3,)),
        ("height", "%DAYS", 1),
    ],
)
def test_literals(call, parameter, text, value):
    _, calls, err = call(
        "--gin_file=plant.gin", "--gin.DAYS=1", f"--gin.PlantConfig.{parameter}={text}"
    )
    assert err == ""
    assert getattr(calls[0][0], parameter) == value


GIVEN = ("--gin_file=plant.gin", "--gin.DAYS=1")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--gin_file=plant.gin",), "DAYS: required; give it by --gin.DAYS=..."),
        ((), "grow.plant: required; give it by --gin.grow.plant=..."),
        (("--gin.grow.plant=@PlantConfig()",), "PlantConfig.height: required"),
        ((*GIVEN, "--gin.PlantConfig.nam=x"), "PlantConfig.nam: no such parameter (did you mean"),
        ((*GIVEN, "--gin.PlantConfg.name=x"), "PlantConfg: no such name (did you mean PlantConfig"),
        ((*GIVEN, "--gin.grow.plant=@PlantConfg()"), "PlantConfg: no such name (did you mean"),
        ((*GIVEN, "--gin.DAYZ=1"), "no binding refers to %DAYZ (did you mean DAYS?)"),
        ((*GIVEN, "--gin.pot/PlantConfig.name=x"), "nothing in this run reads PlantConfig.name"),
        ((*GIVEN, "--gin.PlantConfig.height=%NO"), "%NO: no such macro; define it by NO = ..."),
        ((*GIVEN, "--gin.PlantConfig.height=tall"), "PlantConfig.height: expected int, got 'tall'"),
        ((*GIVEN, "--gin.PlantConfig.height=1e3"), "PlantConfig.height: expected int, got 1000.0"),
        ((*GIVEN, "--gin.PlantConfig.height=-1"), "PlantConfig.height: expected a value greater"),
        ((*GIVEN, "--gin.PlantConfig.evergreen=true"), "expected bool, got 'true' (str)"),
        ((*GIVEN, "--gin.grow.days=soon"), "grow.days: expected int, got 'soon' (str)"),
        ((*GIVEN, "--gin.grow.run_dir=x"), "grow.run_dir: no such parameter"),
        ((*GIVEN, "--gin.PlantConfig.leaves=[1, 2"), "a bracket or a quote is not closed"),
        ((*GIVEN, "--gin.HEIGHT=%HEIGHT"), "refers to itself"),
        ((*GIVEN, "--gin.HEIGHT"), "--gin.HEIGHT: expected --gin.NAME=value"),
        (("--gin_file=plan.gin",), "plan.gin: no such file, here or in configs/"),
        (("--gin_fil=plant.gin",), "did you mean --gin_file?"),
        (("--gin_file",), "expected one argument"),
        ((*GIVEN, "--run_dir=plant.gin"), "run_dir: cannot be written"),
    ],
)  # fmt: skip
def test_mistakes_give_one_line_and_code_2(call, argv, message):
    code, calls, err = call(*argv)
    assert code == 2
    assert calls == []
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("PlantConfig.name = fern", "base.gin:1: fern: not a gin value (in a file, strings need"),
        ("\nPlantConfig.nme = 'x'", "base.gin:2: PlantConfig.nme: no such parameter (did you mean"),
        ("PlantConfig:\n  nme = 'x'", "base.gin:2: PlantConfig.nme: no such parameter"),
        ("PlantConfig.name 'x'", "base.gin:1: Couldn't parse statement"),
        ("PlantConfig.leaves = (2", "a bracket or a quote is not closed"),
        ("include 'nowhere.gin'", "base.gin:1: nowhere.gin: no such file"),
        ("import nowhere", "base.gin:1: No module named 'nowhere'"),
    ],
)
def test_mistakes_in_files_name_file_and_line(call, tmp_path, text, message):
    (tmp_path / "base.gin").write_text(text)
    code, _, err = call(*GIVEN)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("days", "code", "message"),
    [
        (13, 2, "error: days: expected a lucky number, got 13"),
        (14, 130, "error: interrupted"),
        (15, 1, "No such file or directory: 'runs/plant/absent'"),
    ],
)
def test_failures_of_the_run(call, monkeypatch, days, code, message):
    monkeypatch.setattr(cli, "_our_folders", lambda: (Path(__file__).parent,))
    got, _, err = call("--gin_file=plant.gin", f"--gin.DAYS={days}")
    assert got == code
    assert message in err
    assert err.count("\n") == 1


def test_a_bug_keeps_its_traceback(call):
    with pytest.raises(ValueError, match="a bug"):
        call("--gin_file=plant.gin", "--gin.DAYS=16")


def test_a_refused_run_leaves_the_record_of_the_one_before(call, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_our_folders", lambda: (Path(__file__).parent,))
    operative = tmp_path / "out/operative_config.gin"
    assert call(*GIVEN, "--run_dir=out")[0] == 0
    before = operative.read_text()
    assert call(*GIVEN, "--gin.DAYS=13", "--run_dir=out")[0] == 2
    assert operative.read_text() == before
    assert call(*GIVEN, "--gin.DAYS=2", "--run_dir=out")[0] == 0
    assert "DAYS = 2" in operative.read_text()


def test_help_lists_the_macros_of_the_files(call, capsys):
    assert cli.main(grow, ["--gin_file=plant.gin", "--help"]) == 0
    out = capsys.readouterr().out
    assert "Grows a plant." in out
    assert "--gin.HEIGHT=4" in out
    assert "--gin.DAYS=%gin.REQUIRED" in out


def test_as_a_command(tmp_path):
    command = [sys.executable, "-m", "experiments.benchmark", "--gin.benchmark.nothing=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "benchmark.nothing: no such parameter" in done.stderr
    assert "Traceback" not in done.stderr
