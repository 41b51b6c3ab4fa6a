"""The program itself: its table of commands, its exit codes, and that it answers without loading anything heavy."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peftcli import __version__
from peftcli.cli import main
from peftcli.cli.main import COMMANDS, app, load
from peftcli.config.errors import CheckFailed, Mistake, UserError

HEAVY = ("torch", "transformers", "datasets", "peft", "accelerate", "matplotlib", "sklearn", "pandas", "numpy", "scipy")
FOLDER = Path(main.__file__).parent

run = CliRunner().invoke


def in_a_new_process(*arguments: str) -> tuple[int, set[str], str]:
    """Run the program; return its exit code, the heavy modules it imported, and what it printed."""
    code = (
        "import sys\n"
        "from peftcli.cli.main import main\n"
        "try:\n    main()\n"
        "finally:\n"
        f"    print('LOADED', *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    last = [line for line in done.stderr.splitlines() if line.startswith("LOADED")][-1]
    return done.returncode, set(last.split()[1:]), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        ([], 2),
        (["train", "--help"], 0),
        (["train", "quickstart", "optim.lrr=1", "modle=x"], 2),
        (["train", "quickstrat"], 2),
        (["train", "quickstart", "method=peft", "method.type=LOKKR"], 2),
        (["config", "quickstart"], 0),
        (["config", "quickstart", "--origin"], 0),
        (["config", "--schema"], 0),
        (["ls"], 0),
        (["ls", "methods"], 0),
        (["nonsense"], 2),
    ],
)
def test_nothing_heavy_is_imported(arguments, code):
    returned, heavy, printed = in_a_new_process(*arguments)
    assert returned == code, printed
    assert heavy == set()
    assert "Traceback" not in printed


def test_a_mistake_with_traceback_shows_it_and_keeps_the_code():
    mistaken = ["config", "quickstart", "lrr=1"]
    for arguments in (["--traceback", *mistaken], [*mistaken, "--traceback"]):
        code, _, printed = in_a_new_process(*arguments)
        assert code == 2
        assert "Traceback" in printed
        assert "override lrr=1: unknown key" in printed


def test_help_answers_at_once():
    times = []
    for _ in range(3):
        started = time.perf_counter()
        in_a_new_process("--help")
        times.append(time.perf_counter() - started)
    assert min(times) < 1.0  # on a busy machine; alone it is 0.13 s


def test_help_lists_every_command_with_one_line():
    printed = run(app, ["--help"], env={"COLUMNS": "200"}).output
    for name, line in COMMANDS.items():
        assert name in printed
        assert line in printed


def test_every_file_of_a_command_is_in_the_table():
    files = {file.stem for file in FOLDER.glob("*.py")} - {"__init__", "main", "completion"}
    commands = {name for name in files if f"\ndef {name}(" in (FOLDER / f"{name}.py").read_text() or name in COMMANDS}
    assert commands <= set(COMMANDS)


@pytest.mark.parametrize("name", [name for name in COMMANDS if (FOLDER / f"{name}.py").exists()])
def test_every_command_has_help(name):
    result = run(app, [name, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert f"peft {name}" in result.output
    assert "<bool>" not in result.output, "a flag takes no value"


@pytest.mark.parametrize("arguments", [[], ["samples", "list"]])
def test_flags_have_no_type(arguments):
    assert "<bool>" not in run(app, [*arguments, "--help"], env={"COLUMNS": "200"}).output


def test_version():
    assert run(app, ["--version"]).output == f"peftcli {__version__}\n"


def test_an_unknown_command_names_the_nearest():
    result = run(app, ["trian"])
    assert result.exit_code == 2
    assert "Did you mean 'train'" in result.output


def raising(monkeypatch, error: BaseException):
    def fail() -> None:
        raise error

    import peftcli.cli.ls as module

    monkeypatch.setattr(module, "ls", fail)
    return run(app, ["ls"])


def test_a_users_mistake_exits_with_2_and_shows_every_mistake(monkeypatch):
    mistakes = [Mistake("first", "a.yaml:3", ("x", "y"), "x", "do this"), Mistake("second")]
    result = raising(monkeypatch, UserError(*mistakes))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "mistake: a.yaml:3: first",
        "  did you mean: x",
        "  allowed: x, y",
        "  do this",
        "mistake: second",
    ]


def test_a_failed_check_exits_with_1_and_names_the_check(monkeypatch):
    result = raising(monkeypatch, CheckFailed("dead-target", "nothing matches q", "try attention.q"))
    assert result.exit_code == 1
    assert result.stderr == "failed: dead-target: nothing matches q\n  try attention.q\n"


def test_ctrl_c_exits_with_130(monkeypatch):
    result = raising(monkeypatch, KeyboardInterrupt())
    assert result.exit_code == 130
    assert "Ctrl-C" in result.stderr


def test_an_error_of_our_own_is_not_dressed_up_as_the_users(monkeypatch):
    result = raising(monkeypatch, RuntimeError("a bug"))
    assert isinstance(result.exception, RuntimeError)


def test_commands_are_loaded_one_at_a_time():
    assert load("ls").name == "ls"
    with pytest.raises(ModuleNotFoundError):
        load("nonsense")
