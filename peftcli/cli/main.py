"""The command `peft`: its table of commands, its exit codes, and what becomes of a mistake.

A command's file is imported when the command is called, not before, so that help and mistakes answer at once.
"""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from peftcli import __version__, fetch_no_kernels
from peftcli.config.errors import CheckFailed, UserError

COMMANDS = {
    "train": "Fine-tune a model by a recipe, or continue a run with --resume.",
    "eval": "Measure a finished run again, on its own test rows or on others.",
    "predict": "Write a run's predictions for the rows of a file.",
    "jobs": "List this user's runs on a Slurm cluster; cancel one, or show its log.",
    "merge": "Merge a run's adapter into its base and write a plain model folder.",
    "compress": "Make a run's model, or a recipe's base, smaller from the spaces that it uses.",
    "config": "Show a recipe as it is composed, and where each value comes from.",
    "data": "Show what the model will see: counts, balance, lengths, duplicates, rows.",
    "estimate": "Count parameters and memory of a recipe without loading weights.",
    "ls": "List recipes, models, methods, data, checks and runs.",
    "cp": "Copy a shipped recipe to a file of your own.",
    "samples": "Fetch, list, verify and remove sample models and data.",
    "doctor": "Look at this machine and say what will work.",
}
"""Every command and its line of help; each lives in `peftcli.cli.<name>`, as a function or as a typer `app`."""


class _PlainFlags:
    """Shows a flag in the help as `--json`, without the type `<bool>`, which looks like a value to give."""

    def get_params(self, ctx: Any) -> list[Any]:
        params = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class Command(_PlainFlags, TyperCommand):
    """A command."""


class Group(_PlainFlags, TyperGroup):
    """A command with commands of its own."""


def load(name: str) -> Any:
    """The click command of a name in `COMMANDS`; imports its file."""
    module = import_module(f"peftcli.cli.{name}")
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
        app.command(name, cls=Command, help=None)(getattr(module, name))
    command = typer.main.get_command(app)
    command.name = name
    return command


class _Commands(Group):
    """The table above as a group that imports a command only to run it."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        for name, line in COMMANDS.items():
            self.commands[name] = TyperCommand(name, help=line, short_help=line)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ours = args[: args.index("--")] if "--" in args else args
        if "--traceback" in ours:  # accepted after the command too, where it is usually added
            args = ["--traceback", *(arg for arg in ours if arg != "--traceback"), *args[len(ours) :]]
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        if args[0] in COMMANDS:
            return args[0], load(args[0]), args[1:]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (UserError, CheckFailed, KeyboardInterrupt) as error:
            if ctx.params.get("traceback"):
                raise
            raise typer.Exit(report(error)) from error


def report(error: BaseException) -> int:
    """Print what went wrong on standard error, and return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        typer.secho("stopped by Ctrl-C", err=True)
        return 130
    label = typer.style("failed" if isinstance(error, CheckFailed) else "mistake", fg="red", bold=True)
    for line in getattr(error, "mistakes", [error]):
        typer.echo(f"{label}: {line}", err=True)
    return 1 if isinstance(error, CheckFailed) else 2


app = typer.Typer(
    cls=_Commands,
    name="peft",
    help="Fine-tune a pretrained model by changing very little of it.",
    epilog="Start with: peft train quickstart",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"peftcli {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where in the program a mistake was noticed (after any command).")
    ] = False,
) -> None:
    """Options of the program itself; both are read before a command is."""


def main() -> None:
    """The entry point of the command `peft`."""
    # Importing PyTorch and Transformers makes many objects and no garbage: looking for it took a fifth of the time.
    gc.set_threshold(200_000, 50, 100)
    fetch_no_kernels()
    try:
        app()
    except (UserError, CheckFailed, KeyboardInterrupt) as error:  # only with --traceback
        import traceback

        traceback.print_exc()
        sys.exit(report(error))
