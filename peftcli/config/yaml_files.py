"""Reading one YAML file with the line of every key, so that a mistake can be pointed at."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader  # reads 1e-3 as a float and leaves dates alone, as Hydra does
from omegaconf.errors import OmegaConfBaseException

from peftcli.config.errors import Mistake, UserError


@dataclass
class YamlFile:
    """The content of a file and where each part of it stands.

    Attributes:
        path: The file.
        text: Its text.
        content: The parsed mapping; what could not be parsed is left out and named in `mistakes`.
        lines: Line of every key and list item by its dotted path, counted from 1.
        choices: The entries of the defaults list, as (group, choice, line).
        mistakes: What is wrong with the file as YAML.
        is_readable: False where the file is no YAML mapping at all.
    """

    path: Path
    text: str = ""
    content: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    choices: list[tuple[str, str, int]] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)
    is_readable: bool = True

    def where(self, key: str) -> str:
        """`file:line` of a dotted key, or of the closest key above it that is written down."""
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return f"{shown(self.path)}:{self.lines.get(key, 1)}"


def shown(path: Path) -> str:
    """The path as a message prints it: from the working folder where it lies below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def read(path: Path, references: bool = True) -> YamlFile:
    """Read a YAML mapping; mistakes in it are collected, not raised.

    Args:
        path: The file.
        references: Whether `${...}` refers to other values; in a saved run it is plain text.

    Raises:
        UserError: The file cannot be opened or is not text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(Mistake(f"cannot read {shown(path)}: {reason}")) from error
    file = YamlFile(path, text)
    loader = get_yaml_loader()(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return file
        if not isinstance(node, yaml.MappingNode):
            file.mistakes.append(Mistake("the file holds no `key: value` lines", f"{shown(path)}:1"))
            file.is_readable = False
            return file
        _note_lines(file, node, "")
        content = loader.construct_document(node)
    except yaml.YAMLError as error:
        file.mistakes.append(_syntax_mistake(path, error))
        file.is_readable = False
        return file
    finally:
        loader.dispose()
    content = _checked(file, content, "", references)
    if "defaults" in content:
        content["defaults"] = _defaults(file, content["defaults"])
    file.content = content
    return file


def _syntax_mistake(path: Path, error: yaml.YAMLError) -> Mistake:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line = mark.line + 1 if mark else 1
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    hint = "YAML indents with spaces, not tabs" if "\\t" in problem else ""
    return Mistake(f"not valid YAML: {problem}", f"{shown(path)}:{line}", hint=hint)


def _note_lines(file: YamlFile, node: yaml.Node, path: str) -> None:
    """Note the line of every key; a key given twice is a mistake and its second value is left out."""
    if isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            below = f"{path}.{position}"
            file.lines[below] = item.start_mark.line + 1
            _note_lines(file, item, below)
    if not isinstance(node, yaml.MappingNode):
        return
    kept = []
    for key, value in node.value:
        below = f"{path}.{key.value}" if path else str(key.value)
        line = key.start_mark.line + 1
        if key.tag.endswith(":merge"):
            kept.append((key, value))
            continue
        if any(key.value == other.value for other, _ in kept):
            first = file.lines[below]
            file.mistakes.append(
                Mistake(f"{below} is given twice", f"{shown(file.path)}:{line}", hint=f"the first is on line {first}")
            )
            continue
        kept.append((key, value))
        file.lines[below] = line
        _note_lines(file, value, below)
    node.value = kept


def _defaults(file: YamlFile, listed: Any) -> list[Any]:
    """The entries of a defaults list that Hydra can read, with `_self_` among them; the others are mistakes."""
    hint = "write a list of entries such as `- model: NAME`"
    if not isinstance(listed, list):
        file.mistakes.append(Mistake("defaults is not a list", file.where("defaults"), hint=hint))
        return []
    kept = []
    for position, entry in enumerate(listed):
        line = file.lines.get(f"defaults.{position}", 1)
        group, choice = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else ("", entry)
        if not (isinstance(choice, str) or (group and (choice is None or isinstance(choice, list)))):
            file.mistakes.append(
                Mistake(f"{entry!r} in defaults is no choice", f"{shown(file.path)}:{line}", hint=hint)
            )
            continue
        kept.append(entry)
        words = [word for word in group.split() if word not in ("override", "optional")]
        name = words[-1].split("@")[0].lstrip("/") if words else ""
        file.choices += [(name, one, line) for one in (choice if isinstance(choice, list) else [choice]) if one]
    # Hydra would warn and do the same: what a file itself says comes after the groups that it lists.
    return kept if "_self_" in kept else [*kept, "_self_"]


def _checked(file: YamlFile, value: Any, path: str, references: bool) -> Any:
    """The value without what OmegaConf cannot hold: broken `${...}` and keys that are not text or whole numbers."""
    if isinstance(value, list):
        kept = []
        for position, item in enumerate(value):
            name = f"{path}.{position}"
            if not references or _can_hold(file, item, name):
                kept.append(_checked(file, item, name, references))
        return kept
    if not isinstance(value, dict):
        return value
    named = {}
    for key, item in value.items():
        name = f"{path}.{key}".lstrip(".")
        if isinstance(key, bool) or not isinstance(key, str | int):
            file.mistakes.append(Mistake(f"the key {name!r} is not text", file.where(path), hint="put it in quotes"))
        elif not references or _can_hold(file, item, name):
            named[str(key)] = _checked(file, item, name, references)
    return named


def _can_hold(file: YamlFile, value: Any, path: str) -> bool:
    if isinstance(value, dict | list):
        return True
    try:
        OmegaConf.create({"value": value})
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        file.mistakes.append(Mistake(f"{path} has a value that cannot be read: {reason}", file.where(path)))
        return False
    return True
