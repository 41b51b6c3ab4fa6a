"""The arguments after the recipe, in Hydra's grammar: which choose a group, which set a value, which are mistaken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException

from peftcli.config.errors import Mistake, unknown
from peftcli.config.schema import RunConfig
from peftcli.config.sources import Repository


@dataclass
class Overrides:
    """The readable overrides, in two kinds, what was wrong with the others, and the groups they meant to choose."""

    choices: list[Override] = field(default_factory=list)
    values: list[Override] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)
    undecided: set[str] = field(default_factory=set)


def where(override: Override) -> str:
    """How a message names an override."""
    return f"override {override.input_line}"


def sort(lines: list[str], repository: Repository, listed: set[str]) -> Overrides:
    """Parse the overrides and tell group choices from values.

    Args:
        lines: The arguments as typed.
        repository: Where groups and choices are looked up.
        listed: Groups that the recipe's defaults list mentions; a choice for another group is added to the list.
    """
    found = Overrides()
    parser = OverridesParser.create()
    for line, following in _with_next(lines):
        try:
            override = parser.parse_override(line)
            if not override.key_or_group:
                raise ValueError("there is no key before the equals sign")
            if override.is_sweep_override():
                raise ValueError("several values at once; one run takes one value")
            value = override.value()
        except (HydraException, ValueError, TypeError) as error:
            found.mistakes.append(_unreadable(line, following, error))
            continue
        if not repository.group_exists(override.key_or_group) or isinstance(value, dict):
            found.values.append(override)
        elif (mistake := _wrong_choice(override, repository, listed)) is not None:
            found.mistakes.append(mistake)
            found.undecided.add(override.key_or_group)
        else:
            unlisted = override.type == OverrideType.CHANGE and override.get_key_element() not in listed
            found.choices.append(replace(override, type=OverrideType.ADD) if unlisted else override)
    return found


def _with_next(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Each argument, and after a key that lost its equals sign the word that was meant as its value."""
    words = iter(lines)
    for line in words:
        key, _, rest = line.partition(" ")
        if "=" in line or not _is_key(key):
            yield line, ""
        elif rest:
            yield line, rest.strip()
        else:
            following = next(words, "")
            if following == "=":
                following = next(words, "")
            yield line, "" if "=" in following else following
            if "=" in following:
                yield following, ""


def _is_key(word: str) -> bool:
    return word.partition(".")[0] in {item.name for item in fields(RunConfig)}


def _unreadable(line: str, following: str, error: Exception) -> Mistake:
    if "=" not in line and not line.startswith("~"):
        meant = f"{line.split()[0]}={following}" if following else ""
        return Mistake(f"{line!r} is not key=value", f"override {line}", nearest=meant)
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return Mistake(f"cannot be read: {reason}", f"override {line}")


def _wrong_choice(override: Override, repository: Repository, listed: set[str]) -> Mistake | None:
    group, value = override.key_or_group, override.value()
    if override.is_delete():
        return None
    if override.is_force_add():
        return Mistake(f"++ sets values; {group} is a group", where(override), hint=f"write {group}={value}")
    if override.type is OverrideType.ADD and override.get_key_element().lstrip("+") in listed:
        return Mistake(f"the recipe already chooses a {group}", where(override), hint=f"write {group}={value}")
    chosen = value if isinstance(value, list) else [value]
    for name in chosen:
        if not repository.config_exists(f"{group}/{name}"):
            choices = tuple(repository.choices(group))
            hint = f"a value inside the group is set with {group}.KEY=VALUE"
            return replace(unknown(group, str(name), choices, where(override)), hint=hint)
    return None
