"""Arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from peftcli.cli.completion import complete_override, complete_recipe

_RECIPE = typer.Argument(help="A recipe by name (`peft ls recipes`) or by path.", autocompletion=complete_recipe)

Recipe = Annotated[str, _RECIPE]
RecipeOrNone = Annotated[str | None, _RECIPE]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Values in Hydra's grammar: key=value, group=choice.", autocompletion=complete_override),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
