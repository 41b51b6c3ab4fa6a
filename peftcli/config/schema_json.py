"""A JSON schema of recipe files, for editors: types and choices from the dataclasses, help from their docstrings."""

from __future__ import annotations

import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from peftcli.config import catalog
from peftcli.config.documents import describe
from peftcli.config.schema import REQUIRED, RunConfig

_SIMPLE = {int: "integer", float: "number", bool: "boolean", str: "string", type(None): "null"}


def schema() -> dict[str, Any]:
    """The schema of a recipe. No key is required in it, since the defaults list may bring any of them."""
    found = _settings(RunConfig)
    found["properties"]["method"] = {
        "description": describe(RunConfig)["method"],
        "anyOf": [_settings(catalog.settings_class(name)) for name in sorted(catalog.methods())],
    }
    entry = {"anyOf": [{"type": "string"}, {"type": "object", "maxProperties": 1}]}
    listed = {"description": "Groups and their choices, the later over the earlier.", "type": "array", "items": entry}
    found["properties"] = {"defaults": listed, **found["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "peft recipe", **found}


def _settings(cls: type) -> dict[str, Any]:
    hints, help_of = get_type_hints(cls), describe(cls)
    properties = {}
    for item in fields(cls):
        entry: dict[str, Any] = {"description": help_of[item.name]} if item.name in help_of else {}
        entry |= _type(hints[item.name])
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        if default is not MISSING and default is not REQUIRED and not is_dataclass(default):
            entry["default"] = list(default) if isinstance(default, tuple) else default
        properties[item.name] = entry
    described = {"description": cls.__doc__} if cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(") else {}
    return {**described, "type": "object", "additionalProperties": False, "properties": properties}


def _type(annotation: Any) -> dict[str, Any]:
    if annotation is Any:
        return {}
    if annotation in _SIMPLE:
        return {"type": _SIMPLE[annotation]}
    if is_dataclass(annotation):
        return _settings(annotation)  # type: ignore[arg-type]
    shape, parts = get_origin(annotation), get_args(annotation)
    if shape in (types.UnionType, Union):
        return {"anyOf": [_type(part) for part in parts]}
    if shape is Literal:
        return {"enum": list(parts)}
    if shape is dict:
        return {"type": "object", "additionalProperties": _type(parts[1]) or True}
    if shape is tuple and parts[-1] is not Ellipsis:
        items = [_type(part) for part in parts]
        return {"type": "array", "prefixItems": items, "minItems": len(parts), "maxItems": len(parts)}
    return {"type": "array", "items": _type(parts[0])}
