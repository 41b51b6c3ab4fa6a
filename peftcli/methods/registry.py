"""A method's class by its name."""

from __future__ import annotations

from importlib import import_module

from peftcli.config import catalog
from peftcli.config.errors import UserError, unknown
from peftcli.methods.contract import Method


def find(name: str) -> type[Method]:
    """The `Method` class of a built-in method or of an installed package's.

    Raises:
        UserError: There is no method of that name.
    """
    modules = catalog.methods()
    if name not in modules:
        raise UserError(unknown("method", name, modules))
    method: type[Method] = import_module(f"{modules[name]}.tuner").Method
    return method
