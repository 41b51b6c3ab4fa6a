"""What there is to choose from: methods, recipes, the choices of every group. Nothing heavy is imported."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from peftcli.config.errors import UserError, unknown
from peftcli.config.paths import shipped, site

ENTRY_POINTS = "peftcli.methods"


@cache
def methods() -> dict[str, str]:
    """Every method's name and the module that holds its `settings` and `tuner`: our own folders, then entry points."""
    folder = Path(__file__).resolve().parent.parent / "methods"
    found = {file.parent.name: f"peftcli.methods.{file.parent.name}" for file in sorted(folder.glob("*/settings.py"))}
    for point in entry_points(group=ENTRY_POINTS):
        found.setdefault(point.name, point.value)
    return found


def settings_class(name: str) -> type:
    """The dataclass of what a recipe may say about a method.

    Raises:
        UserError: There is no such method, or an outside package's method cannot be imported.
    """
    if name not in methods():
        raise UserError(unknown("method", name, methods()))
    module = f"{methods()[name]}.settings"
    try:
        return import_module(module).Settings
    except (ImportError, AttributeError) as error:
        raise UserError(f"method {name!r} cannot be used: {module} has no Settings ({error})") from error


def recipes() -> dict[str, Path]:
    """The shipped recipes by name, such as `quickstart` or `smollm2/reuters-r8_lora`."""
    folder = shipped("recipes")
    files = sorted(folder.rglob("*.yaml"), key=lambda file: (len(file.parts), file))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def groups(beside: Path | None = None) -> dict[str, list[str]]:
    """The choices of every group, from the shipped `configs`, the site's and, where given, a folder of the user's own.

    Args:
        beside: The `configs` folder beside the recipe.
    """
    found: dict[str, set[str]] = {"method": set(methods())}
    for folder in filter(None, (shipped("configs"), site(), beside)):
        for file in sorted(folder.rglob("*.yaml")):
            group = file.parent.relative_to(folder).as_posix()
            found.setdefault(group, set()).add(file.stem)
    return {group: sorted(found[group]) for group in sorted(found) if group != "."}
