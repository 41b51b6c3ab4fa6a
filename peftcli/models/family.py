"""A model family: which of a checkpoint's modules play which role."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """Names the roles of a family's modules, so that recipes need not follow Transformers' renames.

    Attributes:
        name: The family's name, as `model.family` gives it.
        model_types: The `model_type` values of the configurations that share these module names.
        roles: Role -> regular expression for the end of a module's dotted path, whole path components only.
        default_targets: The roles a method adapts where the recipe names none.
        blocks: Regular expression for the end of a whole block's path: what is repeated along the model's depth.
        idle: Regular expression for the end of a parameter's path that only pre-training computes with, so that
            nothing can be learnt there.
    """

    name: str
    model_types: tuple[str, ...]
    roles: dict[str, str] = field(default_factory=dict)
    default_targets: tuple[str, ...] = ()
    blocks: str = ""
    idle: str = ""

    def pattern(self, role: str) -> re.Pattern[str]:
        """The role's expression, fit for `fullmatch` on a module's full name."""
        return re.compile(rf"(?:.*\.)?(?:{self.roles[role]})")

    def learns(self, parameter: str) -> bool:
        """Whether a parameter, by its full name, takes part in the forward pass."""
        return not self.idle or re.fullmatch(rf"(?:.*\.)?(?:{self.idle})", parameter) is None
