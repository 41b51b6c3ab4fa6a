"""From a recipe and overrides to one checked `RunConfig`, with the origin of every value and all mistakes at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peftcli.config import accelerate_file, catalog
from peftcli.config.draft import Draft
from peftcli.config.errors import Mistake, UserError, nearest, unknown
from peftcli.config.frozen import plain
from peftcli.config.rules import conflicts, two_batch_sizes
from peftcli.config.schema import RunConfig
from peftcli.config.validate import validate
from peftcli.config.yaml_files import shown


@dataclass
class Composed:
    """A composed and checked recipe.

    Attributes:
        config: The run.
        tree: The same as plain dicts and lists.
        origins: Where each value came from by its dotted key: `file:line`, `override ...`, or `schema default`.
        recipe_path: The recipe's file.
        overrides: The overrides as typed.
        notes: What was left out, and why, for the user to read.
    """

    config: RunConfig
    tree: dict[str, Any]
    origins: dict[str, str]
    recipe_path: Path
    overrides: list[str]
    notes: list[str] = field(default_factory=list)


def compose(recipe: str, overrides: Sequence[str] = ()) -> Composed:
    """Compose a recipe with overrides and check the whole of it.

    Args:
        recipe: Name of a shipped recipe, or the path of a YAML file. Groups are looked for in `configs/` beside the
            file first, then among the shipped ones.
        overrides: Arguments in Hydra's grammar. A group may be chosen without `+` also where the recipe does not
            list it.

    Raises:
        UserError: With every mistake in the recipe, its groups and the overrides.
    """
    path = find_recipe(recipe)
    draft, tree = _drafted(path, list(overrides))
    rehearsed = _rehearsal(tree, overrides)
    if rehearsed:
        draft, tree = _rehearsing(path, rehearsed, list(overrides), draft.origin("rehearsal.overrides"))
    if lines := _accelerate(tree, overrides):
        draft, tree = _added(path, lines, [*rehearsed, *overrides], tree["launch"]["accelerate"])
    checked = validate(tree, draft.origin, draft.groups, frozenset(draft.undecided))
    found = checked.mistakes + conflicts(checked) + two_batch_sizes(checked)
    if not draft.is_readable:  # what a file may have said is unknown, so that only overrides can be judged
        found = [mistake for mistake in found if mistake.where.startswith("override ")]
    if mistakes := draft.mistakes + found:
        raise UserError(*sorted(dict.fromkeys(mistakes), key=_reading_order))
    if not checked.config.name:
        checked.config.name, checked.origins["name"] = path.stem, f"name of {shown(path)}"
    return Composed(checked.config, plain(checked.config), checked.origins, path, list(overrides), draft.notes)


def _drafted(path: Path, lines: list[str]) -> tuple[Draft, dict[str, Any]]:
    draft = Draft(path, lines)
    draft.collect()
    draft.apply_values()
    return draft, draft.resolve()


def _rehearsing(
    path: Path, rehearsed: list[str], overrides: list[str], place: str
) -> tuple[Draft, dict[str, Any]]:
    """As `_added`, with the recipe's own overrides."""
    draft, tree = _added(path, rehearsed, overrides, place, "rehearsal, ")
    draft.notes = [f"model.weights=random rehearses the recipe with {', '.join(rehearsed)} ({place})"]
    return draft, tree


def _added(
    path: Path, lines: list[str], overrides: list[str], place: str, kind: str = ""
) -> tuple[Draft, dict[str, Any]]:
    """As `_drafted`, with these lines before the overrides of the command line, named by their place."""
    draft, tree = _drafted(path, [*lines, *overrides])
    for key, origin in draft.origins.items():
        if origin.removeprefix("override ") in lines:
            draft.origins[key] = f"{kind}{place}"
    draft.mistakes = [
        replace(mistake, where=place) if mistake.where.removeprefix("override ") in lines else mistake
        for mistake in draft.mistakes
    ]
    return draft, tree


def _accelerate(tree: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """What the user's own Accelerate file says, without what the command line says itself."""
    launch = tree.get("launch")
    file = launch.get("accelerate") if isinstance(launch, dict) else None
    if not isinstance(file, str):
        return []
    given = {_key(override) for override in overrides}
    return [line for line in accelerate_file.overrides(file) if _key(line) not in given]


def _rehearsal(tree: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """The recipe's own overrides for random weights, without those of keys and groups that the user chooses."""
    model, rehearsal = tree.get("model"), tree.get("rehearsal")
    if not isinstance(model, dict) or model.get("weights") != "random" or not isinstance(rehearsal, dict):
        return []
    lines = rehearsal.get("overrides")
    if not isinstance(lines, list):
        return []
    given = {_key(override) for override in overrides}
    if "data" in given:  # other rows: the templates were for those of the rehearsal
        given |= {"task.prompt", "task.completion"}
    return [line for line in map(str, lines) if given.isdisjoint({key := _key(line), key.partition(".")[0]})]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def find_recipe(recipe: str) -> Path:
    """The file of a recipe given by path or by name.

    Raises:
        UserError: There is no such recipe; names the nearest.
    """
    if Path(recipe).is_file():
        return Path(recipe).resolve()
    known = catalog.recipes()
    if recipe in known:
        return known[recipe]
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        beside = {file.stem: file for file in path.parent.glob("*.y*ml")}
        close = nearest(path.stem, beside)
        near = str(beside[close]) if close else nearest(recipe.removesuffix(path.suffix), known)
        raise UserError(Mistake(f"there is no recipe file {recipe}", nearest=near, hint="list recipes with: peft ls"))
    raise UserError(unknown("recipe", recipe, known, hint="or give the path of a YAML file"))


def _reading_order(mistake: Mistake) -> tuple[bool, str, int]:
    """File by file and line by line, then the overrides as they were typed."""
    file, _, line = mistake.where.rpartition(":")
    if mistake.where.startswith("override ") or not line.isdigit():
        return True, "", 0
    return False, file, int(line)
