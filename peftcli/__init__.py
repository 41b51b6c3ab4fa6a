"""Parameter-efficient fine-tuning from one recipe and one command. Importing this loads no machine-learning library."""

from __future__ import annotations

__version__ = "0.1.0"


def register_with_peft() -> None:
    """Tell PEFT about our adapter types, so that `PeftModel.from_pretrained` loads them; calling it again does nothing.

    Raises:
        UserError: PEFT, or another package, already has a type of the same name.
    """
    from importlib import import_module

    from peftcli.config import catalog
    from peftcli.methods.peft_types import register

    for module in catalog.methods().values():
        if row := getattr(import_module(f"{module}.tuner"), "PEFT_TYPE", None):
            register(row)
