"""Row and column spaces as a method: the class for the mode that a recipe asks for."""

from __future__ import annotations

from peftcli.methods import contract
from peftcli.methods.rowcol.adapter import PEFT_TYPE, Adapter
from peftcli.methods.rowcol.compress import Compress
from peftcli.methods.rowcol.settings import Settings
from peftcli.methods.rowcol.tied import Tie

__all__ = ["PEFT_TYPE", "Method"]

MODES: dict[str, type[contract.Method]] = {"adapter": Adapter, "compress": Compress, "tie": Tie}


class Method(contract.Method):
    """One of `MODES`."""

    def __new__(cls, settings: Settings) -> contract.Method:  # type: ignore[misc]  # a factory by the name that is looked up
        """The mode's own method."""
        return MODES[settings.mode](settings)
