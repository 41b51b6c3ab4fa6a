"""How a method of our own becomes a type of PEFT's: a row in the dictionaries that PEFT looks types up in.

PEFT's own `register_peft_method` takes only names of its closed enum. Its dictionaries are keyed by that `str` enum, so
a `str` with the enum's two attributes serves as a key everywhere PEFT 0.21 looks. The dictionary of types that mix in
one `PeftMixedModel` is left alone: PEFT closes that set by a tuple as well, and refuses others with a clear message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner

from peftcli.config.errors import Mistake, UserError


class PeftName(str):
    """A type's name; what a config's `__post_init__` sets as `self.peft_type`."""

    __slots__ = ()

    @property
    def value(self) -> str:
        """As of PEFT's enum."""
        return str(self)

    @property
    def name(self) -> str:
        """As of PEFT's enum."""
        return str(self)


@dataclass(frozen=True)
class PeftRow:
    """What a method's `tuner` module names `PEFT_TYPE`."""

    name: str
    config: type[PeftConfig]
    tuner: type[BaseTuner]


def register(row: PeftRow) -> None:
    """Make the type known to PEFT; again with the same classes does nothing.

    Raises:
        UserError: The name belongs to other classes.
    """
    name: Any = PeftName(row.name)  # PEFT's annotations say PeftType
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(name)
    if known not in (None, row.config):
        what = f"adapter type {row.name!r} of {row.config.__module__} is taken by {known.__module__}"
        raise UserError(Mistake(what, hint="two installed packages, or a package and PEFT itself, use one name"))
    PEFT_TYPE_TO_CONFIG_MAPPING[name] = row.config
    PEFT_TYPE_TO_TUNER_MAPPING[name] = row.tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[name] = row.tuner.prefix
