"""From the roles (or patterns) that a recipe targets to the modules of the model at hand."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from torch import nn

from peftcli.config.errors import CheckFailed, nearest
from peftcli.models.compact.layers import Factored
from peftcli.models.family import Family

ALL = "all"
NOT_IN_ALL = frozenset({"embed", "norm", "head", "ssm.conv"})
"""Most tuners cannot adapt a convolution of one channel a group (LoRA: only where its rank is a multiple of them)."""


def resolve(model: nn.Module, family: Family, targets: Iterable[str]) -> list[str]:
    """Full names of the modules that the targets mean, in the model's order.

    Args:
        model: The untouched base model.
        family: Its family.
        targets: Each a role (`attention.q`), a group of roles (`attention`), `all` (every role but embed, norm,
            head and ssm.conv), or a module name, its end (`q_proj`) or a regular expression for the whole name.

    Raises:
        CheckFailed: `dead-target`: a target matches no module.
    """
    names = [name for name, _ in model.named_modules() if name]
    chosen: set[str] = set()
    for target in targets:
        found = set(_matches(names, family, target))
        if not found:
            what = f"target {target!r} matches no module of the model"
            raise CheckFailed("dead-target", what, _hint(names, family, target))
        chosen |= found
    chosen = {leaf for name in chosen for leaf in _layers(model, name)}
    return [name for name in names if name in chosen]


def _layers(model: nn.Module, name: str) -> list[str]:
    """The module itself, or in a compact model the smaller layers that stand in its place."""
    module = model.get_submodule(name)
    return [f"{name}.{child}" for child, _ in module.named_children()] if isinstance(module, Factored) else [name]


def role_of(name: str, family: Family) -> str:
    """The role of a module or parameter, also inside an adapter's wrappers; empty where it has none."""
    name = name.replace(".base_layer", "")
    for role, pattern in _role_patterns(tuple(family.roles.items())):
        if pattern.search(name):
            return role
    return ""


def _matches(names: list[str], family: Family, target: str) -> list[str]:
    roles = [
        role
        for role in family.roles
        if role == target or role.startswith(f"{target}.") or (target == ALL and role not in NOT_IN_ALL)
    ]
    if roles:
        patterns = [family.pattern(role) for role in roles]
        return [name for name in names if any(p.fullmatch(name) for p in patterns)]
    found = [name for name in names if name == target or name.endswith(f".{target}")]
    if found:
        return found
    try:
        pattern = re.compile(target)
    except re.error:
        return []
    return [name for name in names if pattern.fullmatch(name)]


def _hint(names: list[str], family: Family, target: str) -> str:
    ends = sorted({name.rsplit(".", 1)[-1] for name in names} - {str(n) for n in range(1000)})
    # Roles of bare parameters (ssm.A) stand in tables of parameters only.
    roles = [role for role in [*family.roles, ALL] if _matches(names, family, role)] if family.roles else []
    lines = [f"roles of {family.name}: {', '.join(roles)}" if roles else f"no roles are known for {family.name} models"]
    lines.append(f"module names end in: {', '.join(ends[:20])}")
    if close := nearest(target, [*roles, *ends]):
        lines.insert(0, f"did you mean: {close}")
    return "\n  ".join(lines)


@cache
def _role_patterns(roles: tuple[tuple[str, str], ...]) -> list[tuple[str, re.Pattern[str]]]:
    return [(role, re.compile(rf"(?:^|\.)(?:{ending})(?:\.|$)")) for role, ending in roles]
