"""A target of making a model smaller: in what, and to which share of what there is."""

from __future__ import annotations

import re
from collections.abc import Mapping

from peftcli.config.errors import Mistake, UserError, unknown

TARGETS = ("parameters", "flops", "latency")


def read(target: Mapping[str, str | float]) -> tuple[str, float]:
    """The unit and the share that a recipe asks for.

    Args:
        target: `{"parameters": "50%"}`, or 0.5.

    Raises:
        UserError: There is not just one target, of a known name, above 0 and below 100 %.
    """
    if len(target) != 1:
        what = f"method.target has {len(target)} targets, expected one" if target else "method.target is missing"
        raise UserError(Mistake(what, "method.target", TARGETS, hint="for example method.target.parameters=50%"))
    ((unit, said),) = target.items()
    key = f"method.target.{unit}"
    if unit not in TARGETS:
        raise UserError(unknown("target", unit, TARGETS, key))
    said = said if isinstance(said, str) else f"{said:g}"
    number = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%?)\s*", said)
    share = float(number[1]) / (100 if number[2] else 1) if number else -1.0
    if not 0 < share < 1:
        what = f"{key} is {said}, expected a share of what there is: above 0 and below 100%"
        raise UserError(Mistake(what, key, hint=f"for example {key}=50%"))
    return unit, share
