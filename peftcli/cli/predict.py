"""`peft predict RUN --input FILE`: a finished run's answers to new rows; `--support` shows it classes it never saw."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftcli.config.errors import UserError

if TYPE_CHECKING:
    from peftcli.artifacts.few_shot import Shown
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
    support: Annotated[
        Path | None,
        typer.Option(help="Examples of each class for a few-shot run: FOLDER/CLASS/*.png, or rows with `label`."),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="With --support: also which experts the examples chose, and their weights."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Use a base with other weights than those of training.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer the rows of a file, one text or a folder of pictures with a finished run; a file's columns are kept.

    A few-shot run (`vit/emoji_smat`) takes `--support`: a handful of examples of each class, and tells those apart.
    """
    if (input is None) == (text is None):
        raise UserError('give it either a file or one text: --input FILE, or --text "..."')
    if text is not None and output is not None:
        raise UserError("--text prints its answer; --output goes with --input")
    if explain and support is None:
        raise UserError("--explain goes with --support FOLDER: it tells what the examples chose")
    from rich.console import Console

    from peftcli.artifacts import answers, merged
    from peftcli.artifacts.tuned import open_tuned
    from peftcli.training.prepare import use_cores

    answers.form(output)  # a wrong ending is told before the work
    with Console(stderr=True).status("loading the model") as status:
        alone = merged.is_merged(run) and not overrides
        tuned = merged.open_merged(run) if alone else open_tuned(run, overrides or [], force=force)
        use_cores(tuned.config.launch)
        if text is not None and tuned.task.architecture == "image-classification":
            raise UserError("this run reads pictures: --input FOLDER, or a file whose rows name them")
        with _examples(tuned, support) as shown:
            found = _answers(tuned, input, text, lambda done, total: status.update(f"{done:,} of {total:,} rows"))
    _say_forced(tuned)
    if text is None:
        _tell(tuned, found, shown, explain, output, as_json)
        return
    [answer] = found.rows
    if as_json:
        typer.echo(json.dumps(answer | _explained(shown, explain), ensure_ascii=False))
    else:
        _say(shown, explain)
        typer.echo(_line(answer))


@dataclass(frozen=True)
class _Found:
    """Answered rows, what is to be known of them, and how fast they came."""

    rows: list[dict[str, Any]]
    notes: list[str]
    pace: Pace | None = None


@contextmanager
def _examples(tuned: Tuned, support: Path | None) -> Iterator[Shown | None]:
    """Within it a few-shot run knows the classes; nothing happens to others."""
    from peftcli.artifacts import few_shot

    if support is None:
        yield None
        return
    with few_shot.shown(tuned, support) as shown:
        yield shown


def _answers(tuned: Tuned, input: Path | None, text: str | None, progress: Callable[[int, int], None]) -> _Found:
    from peftcli.artifacts import answers, picture_answers

    if text is not None:
        return _Found([answers.answer_text(tuned, text)], [])
    assert input is not None
    if tuned.task.architecture == "image-classification":
        return _Found(*picture_answers.answer_pictures(tuned, input, progress))
    return _Found(*answers.answer_file(tuned, input, progress))


def _tell(tuned: Tuned, found: _Found, shown: Shown | None, explain: bool, output: Path | None, as_json: bool) -> None:
    """Write a file's answers where they belong, and what is to be known of them."""
    from peftcli.artifacts import answers, few_shot

    rows, notes = found.rows, [*(shown.notes if shown else []), *found.notes]
    if shown:
        notes += few_shot.judged(rows, few_shot.truth(tuned, rows), shown.support.names)
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    if not as_json:
        _say(shown, explain)
    if output is not None:
        answers.save(rows, output)
    if as_json:
        about = {"rows": len(rows), "notes": notes, "forced_base": tuned.forced_base} | _explained(shown, explain)
        about |= {"pace": found.pace.plain()} if found.pace else {}
        place = {"predictions": rows} if output is None else {"output": str(output)}
        typer.echo(json.dumps(about | place, ensure_ascii=False, default=str))
    elif output is not None:
        typer.echo(f"{len(rows):,} rows answered{_counted(tuned, rows)}: {output}")
    else:
        answers.write(rows, sys.stdout, "jsonl")
    if found.pace and not as_json:
        typer.echo(str(found.pace), err=True)


def _explained(shown: Shown | None, explain: bool) -> dict[str, Any]:
    return {"support": shown.plain()} if shown and explain else {}


def _say(shown: Shown | None, explain: bool) -> None:
    """What the support set chose, in words, beside the answers."""
    if shown and explain:
        for sentence in shown.words():
            typer.echo(sentence, err=True)


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
