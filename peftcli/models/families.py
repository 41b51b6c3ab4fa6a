"""The families there are, and how to find one."""

from __future__ import annotations

from peftcli.config.errors import UserError, unknown
from peftcli.models import llama, mamba, resnet, vit
from peftcli.models.family import Family

FAMILIES: tuple[Family, ...] = (llama.FAMILY, mamba.FAMILY, vit.FAMILY, resnet.FAMILY)


def find(name: str) -> Family:
    """The family of this name, or the one that a checkpoint's `model_type` belongs to.

    Raises:
        UserError: No family has that name or model type.
    """
    for family in FAMILIES:
        if name == family.name or name in family.model_types:
            return family
    known = {family.name for family in FAMILIES} | {t for family in FAMILIES for t in family.model_types}
    raise UserError(unknown("model family", name, known))
