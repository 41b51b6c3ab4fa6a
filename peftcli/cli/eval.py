"""`peft eval RUN`: measure a finished run again."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftcli.config import permission
from peftcli.config.errors import UserError

if TYPE_CHECKING:
    from peftcli.training.few_shot import Then


class Split(StrEnum):
    """What can be measured."""

    train = "train"
    validation = "validation"
    test = "test"


def eval(
    run: Annotated[Path, typer.Argument(help="The run's folder, or the adapter's folder in it.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Other rows, as data.files.test=FILE; where the base is now, as model.name=FOLDER."),
    ] = None,
    split: Annotated[
        Split | None, typer.Option(help="Split to measure; that of the run's report if not given.")
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also what can be had without the model; reads the training rows.")
    ] = False,
    allow_code: Annotated[bool, typer.Option("--allow-code", help=permission.HELP)] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Use a base with other weights than those of training.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Measure so many rows at most, evenly drawn, and answer each of them.")
    ] = None,
    episodes: Annotated[
        int | None, typer.Option(min=2, help="Of a few-shot run: measure so many tasks of each domain.")
    ] = None,
    then: Annotated[
        str | None,
        typer.Option(help="Of a few-shot run: also after fine-tuning each task's model by this method (lora, full)."),
    ] = None,
    then_lr: Annotated[
        float | None,
        typer.Option(min=0, help="Its learning rate; if not given it is chosen on tasks of validation classes."),
    ] = None,
    then_steps: Annotated[int, typer.Option(min=1, help="Its steps on the support of each task.")] = 50,
    output: Annotated[
        Path | None, typer.Option(help="Also write the result, with every example, to this file.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Also write each answered row to this file, as JSON lines or csv.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure a finished run on its own held-out rows, or on others; the run's folder is only read.

    A few-shot run is measured on tasks of each domain (`--episodes`), and with `--then lora` also after fine-tuning the
    model of each task on its support.
    """
    from peftcli.artifacts import answers

    answers.form(predictions)  # before anything is loaded
    given, wanted = list(overrides or []), split.value if split else ""
    if episodes:
        if split == Split.train:
            raise UserError("--episodes is for classes that were not trained on: --split validation or test")
        given += [f"task.{one}_episodes={episodes}" for one in ("validation", "test")]
    few_shot = "--then" if then else "--episodes" if episodes else ""
    found = _measured(
        run, given, wanted, baselines, limit, allow_code, force, _then(then, then_lr, then_steps), few_shot
    )
    if output is not None:
        from peftcli.artifacts.atomic import write_json

        write_json(output, found)
    if predictions is not None:
        answers.save(found["examples"], predictions)
    if as_json:
        typer.echo(json.dumps({key: value for key, value in found.items() if key != "examples"}))
        return
    _print(found)
    if output is not None:
        typer.echo(f"result with every example: {output}")
    if predictions is not None:
        typer.echo(f"{len(found['examples'])} answered rows: {predictions}")


def _then(method: str | None, lr: float | None, steps: int) -> Then | None:
    from peftcli.training import few_shot

    if method is None:
        if lr is not None:
            raise UserError("--then-lr goes with --then METHOD")
        return None
    then = few_shot.Then(method, lr, steps)
    few_shot.check(then)
    return then


def _measured(
    run: Path,
    given: list[str],
    split: str,
    baselines: bool,
    limit: int | None,
    allow_code: bool,
    force: bool,
    then: Then | None,
    few_shot: str,
) -> dict[str, Any]:
    """What `remeasure` finds; `few_shot` names the option that asks for a run of few-shot tasks."""
    from rich.console import Console

    from peftcli.artifacts import few_shot as tasks
    from peftcli.artifacts.remeasure import remeasure
    from peftcli.artifacts.tuned import find, open_tuned
    from peftcli.training import few_shot as tuning
    from peftcli.training.prepare import use_cores

    with permission.code(allow_code), Console(stderr=True).status("measuring"):
        if few_shot:
            tasks.check(find(run), few_shot)
        tuned = open_tuned(run, given, force=force)
        permission.require(tuned.config.task)
        use_cores(tuned.config.launch)
        said: list[str] = []
        also = tuning.measured(tuned, then, said) if then else None
        found = remeasure(tuned, given, split, baselines, limit, also)
        return found | {"notes": [*found["notes"], *said]}


def _print(found: dict[str, Any]) -> None:
    from peftcli.reports.terminal import show

    for note in found["notes"]:
        typer.echo(f"note: {note}")
    if found["forced_base"]:
        typer.echo(f"forced: {len(found['forced_base'])} tensors of this base are not those that were trained on")
    show(found)
    if not found["reported"]:
        return
    changed = {name: change for name, change in found["difference"].items() if change}
    if not changed:
        typer.echo("the tuned model's numbers are those of the run's report, digit for digit")
    for name, change in changed.items():
        typer.echo(f"{name}: {change:+.6g} against the run's report ({found['reported'][name]:.6g})")
    if changed:
        typer.echo("another machine, version, precision or number of threads gives small differences, no large ones")
