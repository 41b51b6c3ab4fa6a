"""What the shell offers after TAB: recipes, groups with their choices, keys of the schema with theirs."""

from __future__ import annotations

from pathlib import Path
from typing import get_type_hints

import typer

from peftcli.config import catalog
from peftcli.config.errors import UserError
from peftcli.config.schema import LAUNCHES, TASKS, RunConfig
from peftcli.config.validate import schema_keys
from peftcli.config.words import names


def complete_recipe(incomplete: str) -> list[str]:
    """Names of shipped recipes, and YAML files where a path is being typed."""
    typed = Path(incomplete)
    folder = typed if incomplete.endswith("/") else typed.parent
    files = [str(file) + ("/" if file.is_dir() else "") for file in folder.glob("*") if _is_recipe_like(file)]
    return [name for name in [*catalog.recipes(), *sorted(files)] if name.startswith(incomplete)]


def complete_override(ctx: typer.Context, incomplete: str) -> list[str]:
    """Groups and keys, and after the equals sign what they take.

    Bash takes `=` for a word of its own: there only the part behind it is offered.
    """
    recipe, typed = ctx.params.get("recipe"), list(ctx.params.get("overrides") or [])
    groups = catalog.groups(Path(recipe).parent / "configs") if recipe and Path(recipe).is_file() else catalog.groups()
    if not incomplete and typed and "=" not in typed[-1] and typed[-1][0] != "~":
        return _values(typed[-1], groups)
    if len(typed) >= 2 and typed[-1] == "=":
        return [value for value in _values(typed[-2], groups) if value.startswith(incomplete)]
    key, equals, begun = incomplete.partition("=")
    if equals:
        return [f"{key}={value}" for value in _values(key, groups) if value.startswith(begun)]
    keys = {key for chosen in _combinations() for key in schema_keys(chosen)}
    return [f"{name}=" for name in sorted({*groups, *keys}) if name.startswith(incomplete)]


def _is_recipe_like(file: Path) -> bool:
    return not file.name.startswith(".") and (file.is_dir() or file.suffix in (".yaml", ".yml"))


def _values(key: str, groups: dict[str, list[str]]) -> list[str]:
    if key in groups:
        return groups[key]
    group, _, name = key.rpartition(".")
    found: list[str] = []
    for chosen in _combinations():
        settings = chosen.get(group) or (get_type_hints(RunConfig).get(group) if group else RunConfig)
        hints = get_type_hints(settings) if isinstance(settings, type) else {}
        found += [value for value in names(hints.get(name, str)) if " " not in value and value not in found]
    return found


def _combinations() -> list[dict[str, type]]:
    """The settings of every method, task and launch at least once."""
    found: list[dict[str, type]] = [{"task": task} for task in TASKS.values()]
    found += [{"launch": launch} for launch in LAUNCHES.values()]
    for name in catalog.methods():
        try:
            found.append({"method": catalog.settings_class(name)})
        except UserError:  # an outside method that cannot be imported has nothing to offer
            continue
    return found
