"""`peft cp RECIPE FILE`: a recipe of one's own to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftcli.cli.completion import complete_recipe
from peftcli.config.errors import Mistake, UserError


def cp(
    recipe: Annotated[str, typer.Argument(help="A recipe by name or by path.", autocompletion=complete_recipe)],
    file: Annotated[Path, typer.Argument(help="The file to write, or a folder to write it in.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Copy a shipped recipe to a file of your own."""
    from peftcli.config.compose import find_recipe
    from peftcli.config.yaml_files import shown

    source = find_recipe(recipe)
    target = file / source.name if file.is_dir() else file
    if target.suffix not in (".yaml", ".yml"):
        hint = f"for example {target}.yaml"
        raise UserError(Mistake(f"{target} would not be found as a recipe: its name must end in .yaml", hint=hint))
    if target.exists() and not force:
        raise UserError(Mistake(f"{shown(target)} is already there", hint="choose another name, or overwrite: --force"))
    try:
        target.write_bytes(source.read_bytes())
    except OSError as error:
        raise UserError(f"cannot write {shown(target)}: {error.strerror}") from error
    typer.echo(f"{shown(target)} is ready; run it with: peft train {shown(target)}")
