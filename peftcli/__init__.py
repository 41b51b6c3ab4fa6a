"""Parameter-efficient fine-tuning from one recipe and one command. Importing this loads no machine-learning library."""

from __future__ import annotations

import logging
import sys

__version__ = "0.1.0"


def fetch_no_kernels() -> None:
    """Keep bitsandbytes, which PEFT imports where it is installed, from fetching compiled code from the model hub.

    It does so as it is imported, where the package `kernels` is here, and else says that it could not. For programs of
    our own, before anything else is imported: it hides that package from the whole process.
    """
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # how Python notes what must not be imported
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


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


def register_with_transformers() -> None:
    """Tell Transformers' Auto classes about compact models (`compact_vit`, ...): `from_pretrained` reads them then."""
    from peftcli.models.compact import registered

    registered.register_all()
