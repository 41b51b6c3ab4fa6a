"""Reading one YAML file with the line of every key, so that a mistake can be pointed at."""

from __future__ import annotations

from collections.abc import Iterator
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
    """

    path: Path
    text: str = ""
    content: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    choices: list[tuple[str, str, int]] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)

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


def read(path: Path) -> YamlFile:
    """Read a YAML mapping; mistakes in it are collected, not raised.

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
            return file
        _note_lines(file, node, "")
        content = loader.construct_document(node)
    except yaml.YAMLError as error:
        file.mistakes.append(_syntax_mistake(path, error))
        return file
    finally:
        loader.dispose()
    file.choices = list(_choices(node))
    file.content = {str(key): _checked(file, value, str(key)) for key, value in content.items()}
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


def _choices(node: yaml.MappingNode) -> Iterator[tuple[str, str, int]]:
    for key, value in node.value:
        if key.value != "defaults" or not isinstance(value, yaml.SequenceNode):
            continue
        for entry in value.value:
            line = entry.start_mark.line + 1
            if isinstance(entry, yaml.ScalarNode):
                yield "", entry.value, line
            elif isinstance(entry, yaml.MappingNode) and entry.value:
                group, choice = entry.value[0]
                words = [word for word in str(group.value).split() if word not in ("override", "optional")]
                yield words[-1].split("@")[0].lstrip("/") if words else "", str(choice.value), line


def _checked(file: YamlFile, value: Any, path: str) -> Any:
    """The value without what OmegaConf cannot hold: broken `${...}` and keys that are not text or whole numbers."""
    if isinstance(value, dict):
        kept = {}
        for key, below in value.items():
            if isinstance(key, bool) or not isinstance(key, str | int):
                written = f"{path}.{key}"
                file.mistakes.append(Mistake(f"the key {written!r} is not text", file.where(path), hint="quote it"))
            else:
                kept[str(key)] = _checked(file, below, f"{path}.{key}")
        return kept
    if isinstance(value, list):
        return [_checked(file, below, f"{path}.{position}") for position, below in enumerate(value)]
    try:
        OmegaConf.create({"value": value})
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        file.mistakes.append(Mistake(f"{path} has a value that cannot be read: {reason}", file.where(path)))
        return None
    return value
