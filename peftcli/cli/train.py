"""`peft train RECIPE key=value ...`, `peft train --resume RUN`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftcli.cli.arguments import Overrides, RecipeOrNone
from peftcli.config import permission
from peftcli.config.errors import CheckFailed, Mistake, UserError
from peftcli.config.schema import SlurmConfig

if TYPE_CHECKING:
    from peftcli.config.compose import Composed
    from peftcli.config.schema import LaunchConfig
    from peftcli.launch.slurm import Submission


def train(
    recipe: RecipeOrNone = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder exactly where it stood.")] = None,
    processes: Annotated[int | None, typer.Option(help="Worker processes; the same as launch.processes=N.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Compose, validate, count, estimate; train nothing.")
    ] = False,
    array: Annotated[
        Path | None, typer.Option(help="Submit a run for each line of overrides in this file; needs launch=slurm.")
    ] = None,
    print_script: Annotated[
        bool, typer.Option("--print-script", help="Show the batch script of launch=slurm; submit nothing.")
    ] = False,
    allow_code: Annotated[bool, typer.Option("--allow-code", help=permission.HELP)] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the closing table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of a table.")] = False,
) -> None:
    """Fine-tune a model and leave a folder with the adapter, the numbers and a report."""
    if (recipe is None) == (resume is None):
        raise UserError(
            "name either a recipe or, with --resume, a run folder: peft train RECIPE, peft train --resume RUN"
        )
    given = [*(overrides or []), *([f"launch.processes={processes}"] if processes is not None else [])]
    given += [f"launch.array={json.dumps(str(array))}"] if array is not None else []
    if resume is not None:
        if overrides:
            what = "it takes no overrides but --processes, which changes no result"
            raise UserError(f"--resume continues the run as it was; {what} ({', '.join(overrides)})")
        if array is not None or print_script:
            raise UserError("--array and --print-script are for a new run; --resume submits what there is")
        with permission.code(allow_code):
            ended = _resume(resume, processes, quiet, as_json)
    else:
        assert recipe is not None
        if dry_run:
            from peftcli.cli.estimate import estimate

            estimate(recipe, given, probe=False, as_json=as_json)
            return
        with permission.code(allow_code):
            from peftcli.config.compose import compose

            ended = start(compose(recipe, given), quiet, as_json, print_script)
    if ended is not None:
        close(*ended, as_json)


def start(
    composed: Composed, quiet: bool, as_json: bool = False, print_script: bool = False
) -> tuple[Path, dict] | None:
    """Train what is composed, and return the folder and the report; on a cluster only see to it that somebody will."""
    from peftcli.artifacts.run_folder import RunFolder
    from peftcli.launch import processes as launch
    from peftcli.launch import slurm, strategy

    for note in composed.notes:
        typer.echo(f"note: {note}", err=True)
    on_cluster = composed.config.launch.type == "slurm"
    if array := getattr(composed.config.launch, "array", None):
        typer.echo(f"every line of {array} is composed and checked", err=True)
    if print_script:
        if not on_cluster:
            raise UserError(Mistake("--print-script shows a batch script", hint="add launch=slurm"))
        typer.echo(slurm.script(composed), nl=False)
        return None
    if not on_cluster:
        launch.check(composed.config.launch)
    strategy.check(composed.config)
    permission.require(composed.config.task)
    if composed.config.fetch:
        from peftcli.data.samples.fetch import ensure

        model, data = composed.config.model, composed.config.data
        parts: list[Any] = [model, data, *data.domains.values()]
        ensure([str(part.name) for part in parts if part.source == "sample"])
    if on_cluster:
        _tell(slurm.start(composed), as_json)
        return None
    folder = RunFolder.create(composed.config, composed.overrides)
    return folder.path, _launch(folder.path, composed.config.launch, quiet, fresh=True)


def _resume(run: Path, processes: int | None, quiet: bool, as_json: bool) -> tuple[Path, dict] | None:
    from peftcli.artifacts.run_folder import RunFolder
    from peftcli.config import frozen
    from peftcli.launch import slurm_array

    if slurm_array.is_array(run):
        _again(run, slurm_array.launch_of(run), processes, as_json)
        return None
    folder = RunFolder.open(run)
    if folder.status == "done":
        typer.echo(f"{run} is already done; its report is below", err=True)
        if not folder.page.is_file():  # the disk was full when it should have been written
            from peftcli.reports import page

            page.write(folder.path)
        return folder.path, folder.read_report()
    launch = frozen.load(folder.config).launch
    if isinstance(launch, SlurmConfig):
        _again(folder.path, launch, processes, as_json)
        return None
    if processes is not None:
        from peftcli.launch import processes as workers

        workers.check(replace(launch, processes=processes))
        folder.use_processes(processes)
        launch = frozen.load(folder.config).launch
    return folder.path, _launch(folder.path, launch, quiet)


def _again(folder: Path, launch: SlurmConfig, processes: int | None, as_json: bool) -> None:
    from peftcli.launch import slurm

    if processes is not None:
        raise UserError(
            "--processes is for a run on one machine; a job goes on with the nodes and processes that it had"
        )
    _tell(slurm.again(folder, launch), as_json)


def _launch(folder: Path, config: LaunchConfig, quiet: bool, fresh: bool = False) -> dict:
    from peftcli.artifacts.run_folder import RunFolder
    from peftcli.launch import processes

    try:
        return processes.start(folder, config, quiet)
    except (UserError, CheckFailed, KeyboardInterrupt) as error:
        if fresh and isinstance(error, UserError) and RunFolder(folder).untrained:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        typer.echo(f"the run is in {folder}; when the cause is mended: peft train --resume {folder}", err=True)
        raise


def _tell(submitted: Submission, as_json: bool) -> None:
    """Say where a job is, and return: nobody waits for it."""
    if as_json:
        typer.echo(json.dumps({name: str(value) for name, value in vars(submitted).items() if value is not None}))
        return
    many = f", an array of {submitted.members}" if submitted.members is not None else ""
    typer.echo(f"submitted as job {submitted.job}{many}")
    typer.echo(f"folder: {submitted.folder}")
    typer.echo(f"log: {submitted.log}")
    typer.echo(f"peft jobs shows how it stands; peft jobs logs {submitted.job}; peft jobs cancel {submitted.job}")


def close(folder: Path, report: dict, as_json: bool) -> None:
    """Say how a run ended, and what came of it."""
    stopped = report["run"]["status"] == "stopped"
    if as_json:
        typer.echo(json.dumps({**report, "folder": str(folder)}))
    elif stopped:
        typer.echo(f"stopped; continue with: peft train --resume {folder}")
    if stopped and report["run"]["stopped_by"] == "SIGINT":
        raise typer.Exit(130)
    if as_json or stopped:
        return
    from peftcli.reports.terminal import show

    show(report)
    typer.echo(f"report: {folder / 'report.html'}")
