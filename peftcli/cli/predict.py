"""`peft predict RUN --input FILE`: a finished run's answers to new rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftcli.config.errors import UserError

if TYPE_CHECKING:
    from peftcli.artifacts.picture_answers import Pace
    from peftcli.artifacts.tuned import Tuned


def predict(
    run: Annotated[
        Path, typer.Argument(help="A run's folder, the adapter's folder in it, or a merged model's folder.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Where the file differs from the run's rows: data.columns.text=body, data.bad_rows=skip."),
    ] = None,
    input: Annotated[
        Path | None, typer.Option(help="Rows as jsonl, csv or parquet, or a folder of pictures; no answers are needed.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="A single text instead of a file.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="A jsonl or csv file to write; standard output if not given.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Use a base with other weights than those of training.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer the rows of a file, one text or a folder of pictures with a finished run; a file's columns are kept."""
    if (input is None) == (text is None):
        raise UserError('give it either a file or one text: --input FILE, or --text "..."')
    if text is not None and output is not None:
        raise UserError("--text prints its answer; --output goes with --input")
    from rich.console import Console

    from peftcli.artifacts import answers, merged, picture_answers
    from peftcli.artifacts.tuned import open_tuned
    from peftcli.training.prepare import use_cores

    answers.form(output)  # a wrong ending is told before the work
    with Console(stderr=True).status("loading the model") as status:
        alone = merged.is_merged(run) and not overrides
        tuned = merged.open_merged(run) if alone else open_tuned(run, overrides or [], force=force)
        use_cores(tuned.config.launch)
        pace = None
        pictures = tuned.task.architecture == "image-classification"
        if text is not None and pictures:
            raise UserError("this run reads pictures: --input FOLDER, or a file whose rows name them")
        if text is not None:
            found: dict[str, Any] = answers.answer_text(tuned, text)
        else:
            assert input is not None

            def shown(done: int, total: int) -> None:
                status.update(f"{done:,} of {total:,} rows")

            if pictures:
                rows, notes, pace = picture_answers.answer_pictures(tuned, input, shown)
            else:
                rows, notes = answers.answer_file(tuned, input, shown)
    _say_forced(tuned)
    if text is not None:
        typer.echo(json.dumps(found, ensure_ascii=False) if as_json else _line(found))
        return
    _tell(tuned, rows, notes, pace, output, as_json)


def _tell(
    tuned: Tuned, rows: list[dict[str, Any]], notes: list[str], pace: Pace | None, output: Path | None, as_json: bool
) -> None:
    """Write a file's answers where they belong, and what is to be known of them."""
    from peftcli.artifacts import answers

    for note in notes:
        typer.echo(f"note: {note}", err=True)
    if output is not None:
        answers.save(rows, output)
    if as_json:
        about = {"rows": len(rows), "notes": notes, "forced_base": tuned.forced_base}
        about |= {"pace": pace.plain()} if pace else {}
        place = {"predictions": rows} if output is None else {"output": str(output)}
        typer.echo(json.dumps(about | place, ensure_ascii=False, default=str))
    elif output is not None:
        typer.echo(f"{len(rows):,} rows answered{_counted(tuned, rows)}: {output}")
    else:
        answers.write(rows, sys.stdout, "jsonl")
    if pace and not as_json:
        typer.echo(str(pace), err=True)


def _say_forced(tuned: Tuned) -> None:
    if tuned.forced_base:
        what = f"forced: {len(tuned.forced_base)} tensors of this base are not those that were trained on"
        typer.echo(what, err=True)


def _counted(tuned: Tuned, rows: list[dict[str, Any]]) -> str:
    """How many rows have each of two labels; empty where there are other answers."""
    counts = {label: sum(row["predicted"] == label for row in rows) for label in tuned.task.labels or []}
    return f" ({', '.join(f'{n:,} {label}' for label, n in counts.items())})" if len(counts) == 2 else ""


def _line(found: dict[str, Any]) -> str:
    return found["predicted"] + (f"  ({found['score']:.1%})" if "score" in found else "")
