"""Type annotations and values in words, for messages."""

from __future__ import annotations

import types
from dataclasses import is_dataclass
from typing import Any, Literal, Union, get_args, get_origin

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    Any: "anything",
}


def expected(annotation: Any) -> str:
    """What a value of this annotation is, in words."""
    if annotation in _WORDS:
        return _WORDS[annotation]
    if is_dataclass(annotation):
        return "a group of keys"
    parts = get_args(annotation)
    origin = get_origin(annotation)
    if origin in (types.UnionType, Union):
        return " or ".join(expected(part) for part in parts)
    if origin is Literal:
        return ("one of " if len(parts) > 1 else "") + ", ".join(str(part) for part in parts)
    if origin is dict:
        return f"keys with {expected(parts[1])} each" if parts[1] is not Any else "keys with values"
    if origin is tuple and parts[-1] is not Ellipsis:
        return f"a list of {len(parts)}: " + ", ".join(expected(part) for part in parts)
    return f"a list of {expected(parts[0])} each"


def names(annotation: Any) -> tuple[str, ...]:
    """The names a value may take, where the annotation lists any."""
    if get_origin(annotation) is Literal:
        return tuple(str(part) for part in get_args(annotation))
    if annotation is bool:
        return ("true", "false")
    if get_origin(annotation) not in (types.UnionType, Union):
        return ()
    parts = get_args(annotation)
    if not any(names(part) for part in parts):
        return ()
    return tuple(name for part in parts for name in (names(part) or (expected(part),)))


def kind(value: Any) -> str:
    """A value with its kind, in words."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "a group of keys (" + ", ".join(str(key) for key in value) + ")"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value!r} (text)" if isinstance(value, str) else f"{value!r}"


_EXAMPLES = {
    "data.columns": ("text", "body"),
    "data.files": ("train", "rows.jsonl"),
    "data.rows": ("train", "10"),
    "data.splits": ("validation", "dev"),
    "model.shape": ("model_type", "llama"),
    "task.labels": ("grain", "cereal"),
}


def mismatch_hint(annotation: Any, value: Any, path: str) -> str:
    """How to write what was probably meant, where that is clear."""
    parts = get_args(annotation) if get_origin(annotation) in (types.UnionType, Union) else (annotation,)
    if path in _EXAMPLES:
        key, one = _EXAMPLES[path]
        return (
            f"for example in a file {path.rpartition('.')[2]}: {{{key}: {one}}}, on the command line {path}.{key}={one}"
        )
    if str in parts and isinstance(value, int | float):
        return f'put it in quotes: in a file {path.rpartition(".")[2]}: "...", on the command line \'{path}="..."\''
    if isinstance(value, str) and {int, float} & set(parts):
        try:
            float(value)
        except ValueError:
            return ""
        return "write the number without quotes"
    if any(get_origin(part) in (list, tuple) for part in parts) and isinstance(value, str):
        return f"write a list: [{value}]"
    if float in map(type, (value,)) and int in parts and float(value).is_integer():
        return f"write {int(value)}"
    return ""
