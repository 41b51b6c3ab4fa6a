"""Rewriting an older recipe: renamed keys get their new names and places, comments stay with their lines."""

from __future__ import annotations

from collections.abc import Iterator

import yaml

from peftcli.config.errors import Mistake, UserError
from peftcli.config.renames import RENAMED
from peftcli.config.schema import SCHEMA_VERSION


def upgraded(text: str) -> str:
    """The text of a recipe with every renamed key under its present name, and the present schema version.

    Raises:
        UserError: The file is of a newer version, is not YAML, or a key cannot be moved without losing a value.
    """
    mistakes = []
    left: set[str] = set()
    # A name that was given up may have been taken by another key since.
    old_names = {name for name, (version, _) in RENAMED.items() if version > _version(text)}
    while found := [entry for entry in _entries(_root(text)) if entry[0] in old_names - left]:
        old, key, value, parent = found[0]
        new = RENAMED[old][1]
        if problem := _obstacle(text, old, new, parent):
            mistakes.append(Mistake(problem, f"line {key.start_mark.line + 1}", hint="change this one by hand"))
            left.add(old)
        elif old.rpartition(".")[0] == new.rpartition(".")[0]:
            text = _renamed(text, key, new.rpartition(".")[2])
        else:
            text = _moved(text, old, key, value, new)
    if mistakes:
        raise UserError(*mistakes)
    return _versioned(text)


def _root(text: str) -> yaml.MappingNode:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"the file is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(root, yaml.MappingNode):
        raise UserError("the file holds no `key: value` lines")
    return root


def _entries(
    node: yaml.MappingNode, path: str = ""
) -> Iterator[tuple[str, yaml.ScalarNode, yaml.Node, yaml.MappingNode]]:
    """Every key: dotted name, key node, value node, mapping it stands in."""
    for key, value in node.value:
        full = f"{path}.{key.value}" if path else str(key.value)
        yield full, key, value, node
        if isinstance(value, yaml.MappingNode):
            yield from _entries(value, full)


def _find(text: str, name: str) -> tuple[yaml.ScalarNode, yaml.Node] | None:
    return next(((key, value) for full, key, value, _ in _entries(_root(text)) if full == name), None)


def _obstacle(text: str, old: str, new: str, parent: yaml.MappingNode) -> str:
    if _find(text, new):
        return f"{old} is now {new}, and the file has both"
    if old.rpartition(".")[0] == new.rpartition(".")[0]:
        return ""
    group = _find(text, new.partition(".")[0]) if "." in new else None
    if parent.flow_style or (group and (not isinstance(group[1], yaml.MappingNode) or group[1].flow_style)):
        return f"{old} is now {new}, and cannot be moved out of or into a group in braces"
    return ""


def _renamed(text: str, key: yaml.ScalarNode, name: str) -> str:
    return text[: key.start_mark.index] + name + text[key.end_mark.index :]


def _moved(text: str, old: str, key: yaml.ScalarNode, value: yaml.Node, new: str) -> str:
    """Cut the lines of an entry, with the comment above it, and paste them into the group of the new name."""
    lines = text.splitlines()
    first, last = key.start_mark.line, max(_last_line(value), key.start_mark.line)
    indent = " " * key.start_mark.column
    start = first
    while start > 0 and lines[start - 1].startswith(f"{indent}#"):
        start -= 1
    block = [line[len(indent) :] for line in lines[start : last + 1]]
    group, _, name = new.rpartition(".")
    block[first - start] = name + block[first - start][key.end_mark.column - key.start_mark.column :]
    del lines[start : last + 1]
    rest = _without_empty("\n".join(lines), old.rpartition(".")[0])
    if not group:
        return rest.rstrip("\n") + "\n" + "\n".join(block) + "\n"
    found = _find(rest, group) if _has_keys(rest) else None
    if found is None or not isinstance(found[1], yaml.MappingNode):
        pasted = [f"{group}:", *(f"  {line}" if line else line for line in block)]
        return (rest.rstrip("\n") + "\n" if rest.strip() else "") + "\n".join(pasted) + "\n"
    inside = " " * found[1].value[0][0].start_mark.column
    kept = rest.splitlines()
    end = _last_line(found[1]) + 1
    return "\n".join([*kept[:end], *(inside + line if line else line for line in block), *kept[end:]]) + "\n"


def _has_keys(text: str) -> bool:
    return yaml.compose(text, Loader=yaml.SafeLoader) is not None


def _last_line(node: yaml.Node) -> int:
    """The last line with content; a block's end mark stands where the next key begins."""
    if isinstance(node, yaml.MappingNode) and not node.flow_style and node.value:
        return _last_line(node.value[-1][1])
    if isinstance(node, yaml.SequenceNode) and not node.flow_style and node.value:
        return _last_line(node.value[-1])
    ends_before_next = node.end_mark.column == 0 and node.end_mark.line > node.start_mark.line
    return node.end_mark.line - 1 if ends_before_next else node.end_mark.line


def _without_empty(text: str, group: str) -> str:
    """The text without a group that lost its last key, since a null group would be a mistake."""
    found = _find(text, group) if group and _has_keys(text) else None
    if found is None or not isinstance(found[1], yaml.ScalarNode) or found[1].value:
        return text
    lines = text.splitlines()
    del lines[found[0].start_mark.line]
    return "\n".join(lines)


def _version(text: str) -> int:
    found = _find(text, "schema_version")
    return int(str(found[1].value)) if found and str(found[1].value).isdigit() else 0


def _versioned(text: str) -> str:
    found = _find(text, "schema_version")
    if found is None:
        first = _root(text).value[0][0].start_mark.index if _root(text).value else 0
        return f"{text[:first]}schema_version: {SCHEMA_VERSION}\n{text[first:]}"
    value = found[1]
    if str(value.value).isdigit() and int(value.value) > SCHEMA_VERSION:
        raise UserError(
            Mistake(
                f"the file has schema_version {value.value}, newer than this program's {SCHEMA_VERSION}",
                hint="upgrade with: pip install -U peftcli",
            )
        )
    return text[: value.start_mark.index] + str(SCHEMA_VERSION) + text[value.end_mark.index :]
