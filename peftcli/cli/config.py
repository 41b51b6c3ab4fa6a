"""`peft config RECIPE`: what a recipe comes to, where each value was written, and what may be written at all."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from peftcli.cli.arguments import AsJson, Overrides, RecipeOrNone
from peftcli.config.errors import Mistake, UserError


def config(
    recipe: RecipeOrNone = None,
    overrides: Overrides = None,
    origin: Annotated[bool, typer.Option("--origin", help="Show where each value came from.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Put above each key what it means.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print a JSON schema for editors; needs no recipe.")] = False,
    upgrade: Annotated[
        bool, typer.Option("--upgrade", help="Rewrite the file with the present names of keys.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show a recipe as it is composed, and where each value comes from."""
    if schema:
        from peftcli.config.schema_json import schema as of_recipes

        typer.echo(json.dumps(of_recipes(), indent=2))
        return
    if recipe is None:
        raise UserError(Mistake("no recipe given", hint="peft config RECIPE; list them with: peft ls"))
    if upgrade:
        _upgrade(recipe, overrides or [])
        return
    from peftcli.config.compose import compose

    composed = compose(recipe, overrides or [])
    for note in composed.notes:
        typer.echo(f"note: {note}", err=True)
    if origin:
        _print_origins(composed.tree, composed.origins, as_json)
    elif as_json:
        typer.echo(json.dumps(composed.tree, indent=2))
    else:
        typer.echo(_yaml(composed.tree, _help_of(composed.config) if explain else {}), nl=False)


def _print_origins(tree: dict[str, Any], origins: dict[str, str], as_json: bool) -> None:
    rows = [{"key": key, "value": value, "origin": origins.get(key, "")} for key, value in _leaves(tree, origins)]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    rows = [row | {"origin": _short(row["origin"])} for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in ("key", "origin")]
    for row in rows:
        value = json.dumps(row["value"], ensure_ascii=False)
        typer.echo(f"{row['key']:<{widths[0]}}  {row['origin']:<{widths[1]}}  {value}")


def _short(origin: str) -> str:
    """An origin with a shipped file's path from `configs/` or `recipes/` on; the user's own paths stay."""
    from peftcli.config.paths import shipped

    for folder in ("configs", "recipes"):
        origin = origin.replace(f"{shipped(folder)}{os.sep}", f"{folder}/")
    return origin


def _leaves(tree: dict[str, Any], origins: dict[str, str], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{path}.{name}" if path else name
        if isinstance(value, dict) and value and any(known.startswith(f"{key}.") for known in origins):
            yield from _leaves(value, origins, key)
        else:
            yield key, value


def _help_of(config: Any) -> dict[str, str]:
    from dataclasses import fields, is_dataclass

    from peftcli.config.documents import describe

    found = dict(describe(type(config)))
    for item in fields(config):
        if is_dataclass(group := getattr(config, item.name)):
            found[item.name] = (type(group).__doc__ or "").strip()
            found |= {f"{item.name}.{name}": text for name, text in describe(type(group)).items()}
    return found


def _yaml(tree: dict[str, Any], help_of: dict[str, str]) -> str:
    from peftcli.config.frozen import dump

    lines = []
    for key, value in tree.items():
        lines += [f"# {help_of[key]}"] if key in help_of else []
        inner = {name: help_of.get(f"{key}.{name}") for name in value} if isinstance(value, dict) and help_of else {}
        for line in dump({key: value}).splitlines():
            name = line[2:].partition(":")[0] if line.startswith("  ") and line[2:3] not in (" ", "-") else ""
            lines += [f"  # {inner[name]}"] if inner.get(name) else []
            lines.append(line)
    return "\n".join(lines) + "\n"


def _upgrade(recipe: str, overrides: list[str]) -> None:
    from peftcli.config.compose import find_recipe
    from peftcli.config.upgrade import upgraded
    from peftcli.config.yaml_files import shown

    if overrides:
        raise UserError(f"--upgrade rewrites the file and takes no overrides ({', '.join(overrides)})")
    path = find_recipe(recipe)
    before = path.read_text(encoding="utf-8")
    after = upgraded(before)
    if after == before:
        typer.echo(f"{shown(path)} is up to date")
        return
    try:
        path.write_text(after, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {shown(path)}: {error.strerror}") from error
    both = (before.splitlines(keepends=True), after.splitlines(keepends=True))
    typer.echo("".join(difflib.unified_diff(*both, f"{shown(path)} (before)", f"{shown(path)} (after)")), nl=False)
