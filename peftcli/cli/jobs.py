"""`peft jobs`, `peft jobs cancel ID`, `peft jobs logs ID`: this user's runs on a cluster."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from peftcli.cli.main import Command, Group
from peftcli.config.errors import UserError

app = typer.Typer(
    cls=Group,
    help="List this user's runs on a cluster: state, step, last loss.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
Runs = Annotated[Path, typer.Option("--runs", help="Folder of runs, or of an array, to look in.")]
Name = Annotated[str, typer.Argument(metavar="ID", help="Number of a job, or a run folder.", show_default=False)]


@app.callback(invoke_without_command=True)
def jobs(
    context: typer.Context,
    runs: Runs = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the runs that were submitted: those in the queue, and those in a folder of runs."""
    if context.invoked_subcommand:
        return
    from peftcli.launch.slurm_standing import standings

    rows, note = standings(runs)
    if note:
        typer.echo(f"note: states are those of the run folders: {note}", err=True)
    if as_json:
        typer.echo(json.dumps([{**vars(row), "folder": str(row.folder)} for row in rows], indent=2))
        return
    if not rows:
        typer.echo(f"no jobs in the queue, and none were submitted of runs in {runs}", err=True)
        return
    from peftcli.cli.tables import titled, whole_lines

    console = whole_lines()
    table = titled(console, "Jobs", "job", "state", "step", "loss", "run")
    for column in (1, 4):
        table.columns[column].justify = "left"
    for row in rows:
        step, loss = ("" if value is None else f"{value:.4g}" for value in (row.step, row.loss))
        table.add_row(row.job, row.state, step, loss, str(row.folder))
    console.print(table)


@app.command(cls=Command)
def cancel(name: Name) -> None:
    """Cancel a job, a member of an array, or a whole array; a run that has begun leaves a checkpoint."""
    from peftcli.launch import slurm_queue

    is_number = name.replace("_", "").isdigit() and not Path(name).is_dir()
    numbers = [name] if is_number else [job.id for job in slurm_queue.of_folder(Path(name))]
    if not numbers:
        raise UserError(f"no job in the queue trains in {name}; peft jobs lists those that do")
    slurm_queue.call("scancel", *numbers)
    said = f"job {numbers[0]} is" if len(numbers) == 1 else f"jobs {', '.join(numbers)} are"
    typer.echo(f"{said} being cancelled; a run that has begun leaves a checkpoint to resume from")


@app.command(cls=Command)
def logs(
    name: Name,
    runs: Runs = Path("runs"),
    lines: Annotated[int, typer.Option("--lines", "-n", help="Lines from the end.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on showing what is printed.")] = False,
) -> None:
    """Show the end of what a job has printed."""
    from peftcli.launch.slurm_standing import find, log_of

    row = find(name, runs)
    place = log_of(row)
    if not place.is_file():
        raise UserError(f"job {row.job} has printed nothing yet ({row.state}); its log will be {place}")
    subprocess.run(["tail", f"--lines={lines}", *(["--follow=name"] if follow else []), str(place)], check=False)
