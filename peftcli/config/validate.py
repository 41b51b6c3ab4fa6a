"""The composed tree against the dataclasses of `schema`: every unknown key, wrong type, wrong choice, missing value."""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from peftcli.config import catalog, peft_types
from peftcli.config.errors import Mistake, UserError, nearest, unknown
from peftcli.config.renames import RENAMED
from peftcli.config.schema import LAUNCHES, REQUIRED, TASKS, RunConfig
from peftcli.config.words import expected, kind, mismatch_hint, names

SCHEMA_DEFAULT = "schema default"


class _Mark(Enum):
    UNREADABLE = "unreadable"


UNREADABLE: Any = _Mark.UNREADABLE
"""Stands for a value that was already named as a mistake; nothing more is said about it."""


@dataclass
class Checked:
    """The outcome of a validation.

    Attributes:
        config: The run; where there are mistakes, with `UNREADABLE` in their places.
        origins: Where each value came from, by dotted key.
        mistakes: All of them.
    """

    config: RunConfig
    origins: dict[str, str] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)


def validate(
    tree: dict[str, Any],
    origin: Callable[[str], str],
    choices: dict[str, list[str]] | None = None,
    undecided: frozenset[str] = frozenset(),
) -> Checked:
    """Build the `RunConfig` of a composed tree.

    Args:
        tree: Nested dicts, lists and scalars.
        origin: Where a dotted key, or the closest key above it, was written.
        choices: The choices of every group, to name them where a group is missing.
        undecided: Groups whose choice was already named as a mistake; what they lack is not named again.
    """
    checker = _Checker(origin, choices or {}, chosen_settings(tree), undecided)
    config = checker.settings(RunConfig, tree, "")
    return Checked(config, checker.origins, checker.mistakes)


class _Checker:
    def __init__(
        self,
        origin: Callable[[str], str],
        choices: dict[str, list[str]],
        chosen: dict[str, type],
        undecided: frozenset[str],
    ):
        self.origin, self.choices, self.chosen, self.undecided = origin, choices, chosen, undecided
        self.origins: dict[str, str] = {}
        self.mistakes: list[Mistake] = []

    def settings(self, cls: type, value: Any, path: str) -> Any:
        """A dataclass from a mapping; each field on its own, so that one mistake hides no other."""
        if not isinstance(value, dict):
            return self._not_a_group(value, path)
        hints = get_type_hints(cls)
        known = {item.name: item for item in fields(cls) if item.init}
        built: dict[str, Any] = {}
        for name, item in known.items():
            below = _join(path, name)
            if name in value:
                built[name] = self.value(hints[name], value[name], below)
                if not is_dataclass(built[name]):
                    self.origins[below] = self.origin(below)
            else:
                built[name] = self._absent(item, hints[name], below)
        for name in value:
            if name not in known:
                self.mistakes.append(self._unknown_key(path, name, known))
        return cls(**built)

    def _absent(self, item: Any, annotation: Any, path: str) -> Any:
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        if is_dataclass(default) and not isinstance(default, type):
            return self.settings(type(default), {}, path)
        if default is MISSING or default is REQUIRED:
            if path.partition(".")[0] not in self.undecided:
                self.mistakes.append(self._missing(annotation, path))
            return UNREADABLE
        self.origins[path] = SCHEMA_DEFAULT
        return default

    def _missing(self, annotation: Any, path: str) -> Mistake:
        place = self.origin(path)
        if path in self.choices:
            hint = f"add `- {path}: NAME` to the recipe's defaults list, or {path}=NAME on the command line"
            return Mistake(f"the recipe has no {path}", place, tuple(self.choices[path]), hint=hint)
        if path == "method.type" and self.chosen.get("method") is catalog.settings_class("peft"):
            hint = "choose one on the command line, such as method.type=LOKR, or in the recipe's method block"
            return Mistake(f"{path} is missing", place, tuple(sorted(peft_types.arguments())), hint=hint)
        return Mistake(f"{path} is missing; it takes {expected(annotation)}", place, names(annotation))

    def _not_a_group(self, value: Any, path: str) -> Any:
        if value is not UNREADABLE:
            hint = "give it keys, or remove the line" if value is None else ""
            if isinstance(value, str):
                hint = f"choose it in the defaults list: `- {path}: {value}`, or on the command line: {path}={value}"
            found = kind(value)
            self.mistakes.append(Mistake(f"{path} is {found}, expected a group of keys", self.origin(path), hint=hint))
        return UNREADABLE

    def value(self, annotation: Any, value: Any, path: str) -> Any:
        """One value of any annotation that settings use; a mistake is noted and gives `UNREADABLE`."""
        if value is UNREADABLE:
            return value
        if path == "method":
            return self._method(value)
        if path == "launch" and isinstance(value, dict):
            value = {"type": "local", **value}
        if annotation is Any:
            return value
        if is_dataclass(annotation):
            return self.settings(annotation, value, path)  # type: ignore[arg-type]
        shape = get_origin(annotation)
        if shape in (types.UnionType, Union):
            return self._union(annotation, value, path)
        if shape is Literal:
            fits = any(value == choice and type(value) is type(choice) for choice in get_args(annotation))
            return value if fits else self._wrong_choice(annotation, value, path)
        if shape in (list, tuple, dict):
            return self._container(annotation, value, path)
        if annotation is float and type(value) is int:
            return float(value)
        return value if type(value) is annotation else self._mismatch(annotation, value, path)

    def _container(self, annotation: Any, value: Any, path: str) -> Any:
        shape, parts = get_origin(annotation), get_args(annotation)
        if shape is dict:
            if not isinstance(value, dict):
                return self._mismatch(annotation, value, path)
            self.origins |= {_join(path, key): self.origin(_join(path, key)) for key in value}
            return {key: self.value(parts[1], item, _join(path, key)) for key, item in value.items()}
        if not isinstance(value, list | tuple):
            return self._mismatch(annotation, value, path)
        if shape is tuple and parts[-1] is not Ellipsis:
            if len(value) != len(parts):
                return self._mismatch(annotation, value, path)
            return tuple(
                self.value(part, item, f"{path}.{i}") for i, (part, item) in enumerate(zip(parts, value, strict=True))
            )
        return shape(self.value(parts[0], item, f"{path}.{i}") for i, item in enumerate(value))

    def _union(self, annotation: Any, value: Any, path: str) -> Any:
        members = get_args(annotation)
        groups = [member for member in members if is_dataclass(member)]
        if groups and isinstance(value, dict):
            return self._by_discriminator(groups, value, path)
        for member in members:
            if member is type(None):
                if value is None:
                    return None
                continue
            trial = _Checker(self.origin, self.choices, self.chosen, self.undecided)
            found = trial.value(member, value, path)
            if not trial.mistakes:
                return found
        if groups:
            return self._not_a_group(value, path)
        plain = [member for member in members if member is not type(None)]
        if len(plain) == 1:  # an optional value: the message of the value itself says more
            return self.value(plain[0], value, path)
        return self._mismatch(annotation, value, path)

    def _by_discriminator(self, groups: list[Any], value: dict[str, Any], path: str) -> Any:
        key = next(name for name, hint in get_type_hints(groups[0]).items() if get_origin(hint) is Literal)
        by_name = {name: group for group in groups for name in get_args(get_type_hints(group)[key])}
        chosen = value.get(key, UNREADABLE)
        if key not in value:
            self.mistakes.append(Mistake(f"{path}.{key} is missing", self.origin(path), tuple(by_name)))
        elif chosen is not UNREADABLE and (not isinstance(chosen, str) or chosen not in by_name):
            place = self.origin(f"{path}.{key}")
            self.mistakes.append(unknown(f"{path}.{key}", str(chosen), by_name, place))
        if not isinstance(chosen, str) or chosen not in by_name:
            return UNREADABLE
        return self.settings(by_name[chosen], value, path)

    def _method(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return self._not_a_group(value, "method")
        known = tuple(sorted(catalog.methods()))
        name = value.get("name")
        if name is UNREADABLE:
            return UNREADABLE
        if name is None:
            self.mistakes.append(Mistake("method.name is missing", self.origin("method"), known))
            return UNREADABLE
        if not isinstance(name, str) or name not in known:
            self.mistakes.append(unknown("method", str(name), known, self.origin("method.name")))
            return UNREADABLE
        try:
            settings = catalog.settings_class(name)
        except UserError as error:
            self.mistakes += error.mistakes
            return UNREADABLE
        return self.settings(settings, value, "method")

    def _mismatch(self, annotation: Any, value: Any, path: str) -> Any:
        what = f"{path} is {kind(value)}, expected {expected(annotation)}"
        known = names(annotation)
        near = nearest(value, known) if isinstance(value, str) else ""
        self.mistakes.append(Mistake(what, self.origin(path), known, near, mismatch_hint(annotation, value, path)))
        return UNREADABLE

    def _wrong_choice(self, annotation: Any, value: Any, path: str) -> Any:
        known = names(annotation)
        mistake = Mistake(f"{path} cannot be {value!r}", self.origin(path), known, nearest(str(value), known))
        self.mistakes.append(mistake)
        return UNREADABLE

    def _unknown_key(self, path: str, name: str, known: dict[str, Any]) -> Mistake:
        full = _join(path, name)
        place = self.origin(full)
        if full in RENAMED:
            version, new = RENAMED[full]
            return Mistake(
                f"unknown key {full!r}: since schema version {version} it is {new}",
                place,
                nearest=new,
                hint="rewrite the file with: peft config RECIPE --upgrade",
            )
        if path == "launch" and (kinds := [kind for kind, group in LAUNCHES.items() if name in _field_names(group)]):
            return Mistake(f"unknown key {full!r}", place, tuple(sorted(known)), hint=f"it is of launch={kinds[0]}")
        everywhere = schema_keys(self.chosen)
        elsewhere = [key for key in everywhere if key.rpartition(".")[2] == name]
        beside = nearest(name, known)
        if elsewhere:
            hint = f"{name} belongs elsewhere: {' or '.join(elsewhere)}"
            return Mistake(f"unknown key {full!r}", place, tuple(sorted(known)), elsewhere[0], hint)
        if not beside:
            leaf = nearest(name, {key.rpartition(".")[2] for key in everywhere})
            near = next((key for key in everywhere if leaf and key.rpartition(".")[2] == leaf), "")
        else:
            near = _join(path, beside)
        return Mistake(f"unknown key {full!r}", place, tuple(sorted(known)), near)


def chosen_settings(tree: dict[str, Any]) -> dict[str, type]:
    """The settings classes of the tree's method, task and launch, where it names real ones."""
    method, task, launch = tree.get("method"), tree.get("task"), tree.get("launch")
    kind = launch.get("type", "local") if isinstance(launch, dict) else "local"
    found: dict[str, type] = {"launch": LAUNCHES.get(str(kind), LAUNCHES["local"])}
    if isinstance(method, dict) and isinstance(method.get("name"), str) and method["name"] in catalog.methods():
        with suppress(UserError):  # named as a mistake where the method itself is checked
            found["method"] = catalog.settings_class(method["name"])
    if isinstance(task, dict) and isinstance(task.get("type"), str) and task["type"] in TASKS:
        found["task"] = TASKS[task["type"]]
    return found


def schema_defaults(chosen: dict[str, type]) -> dict[str, Any]:
    """The default of every field that has one, with those of the chosen method, task and launch."""
    return _defaults_of(RunConfig, {"launch": LAUNCHES["local"], **chosen})


def _defaults_of(cls: type, chosen: dict[str, type]) -> dict[str, Any]:
    found = {}
    hints = get_type_hints(cls)
    for item in fields(cls):
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        group = chosen.get(item.name) or hints[item.name]
        if is_dataclass(group):
            found[item.name] = _defaults_of(group, {})  # type: ignore[arg-type]
        elif default is not MISSING and default is not REQUIRED:
            found[item.name] = default
    return found


def schema_keys(chosen: dict[str, type]) -> list[str]:
    """Every dotted key of the schema, with the keys of the chosen method, task and launch."""
    found, chosen = [], {"launch": LAUNCHES["local"], **chosen}
    hints = get_type_hints(RunConfig)
    for item in fields(RunConfig):
        group = chosen.get(item.name) or (hints[item.name] if is_dataclass(hints[item.name]) else None)
        if group is None:
            found.append(item.name)
        else:
            found += _keys_below(item.name, group)
    return found


def _keys_below(path: str, group: Any) -> list[str]:
    hints = get_type_hints(group)
    found = []
    for below in fields(group):
        nested = hints[below.name]
        found += _keys_below(f"{path}.{below.name}", nested) if is_dataclass(nested) else [f"{path}.{below.name}"]
    return found


def _field_names(group: type) -> set[str]:
    return {item.name for item in fields(group)}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else str(name)
