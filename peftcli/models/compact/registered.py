"""Compact models as types of Transformers: `compact_vit` is a `vit` with parts, and so on for every family.

Each class is Transformers' own with one more step, so that module names, heads, `generate` and `save_pretrained` are
what they are there. A saved folder is complete: its configuration lists the parts, and its tensors are theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig

from peftcli.models import families
from peftcli.models.compact.parts import Parts, build
from peftcli.models.family import COMPACT


@cache
def config_class(base: Any) -> Any:
    """The configuration class of compact models of a type; it has `parts` beside the base's fields."""
    made = {"model_type": COMPACT + base.model_type, "parts": {}, "__module__": __name__}
    return type(f"Compact{base.__name__}", (base,), made)


@cache
def model_class(base: Any) -> Any:
    """The class of compact models of a class of Transformers'."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        build(self, config.parts)
        self.post_init()

    kind = config_class(base.config_class)
    inside = {"__init__": __init__, "config_class": kind, "__module__": __name__}
    return type(f"Compact{base.__name__}", (base,), inside)


def compacted(model: Any, parts: Parts) -> Any:
    """Make a model a compact one, in place; the parts' tensors are new, and for the caller to fill.

    Args:
        model: A model of Transformers, or a compact one, which gets these parts beside its own.
        parts: As `parts.build` takes them.
    """
    build(model, parts)
    if not model.config.model_type.startswith(COMPACT):
        model.config.__class__ = config_class(model.config.__class__)
        model.__class__ = model_class(model.__class__)
    model.config.parts = {**model.config.parts, **parts}
    return model


@cache
def register(model_type: str) -> None:
    """Tell Transformers' Auto classes about compact models of a type.

    Args:
        model_type: Of the base, or of the compact model.
    """
    from peftcli.models import mamba_gaps

    mamba_gaps.fill()
    base: Any = CONFIG_MAPPING[model_type.removeprefix(COMPACT)]
    kind = config_class(base)
    AutoConfig.register(kind.model_type, kind, exist_ok=True)
    for auto in _auto_classes():
        if base in auto._model_mapping:
            found = auto._model_mapping[base]  # of DeiT there are two, and the Auto class takes the first
            auto.register(kind, model_class(found[0] if isinstance(found, tuple) else found), exist_ok=True)


def know(shape: Mapping[str, Any]) -> None:
    """Register the type of a model with this configuration, if it is a compact one."""
    model_type = str(shape.get("model_type"))
    if model_type.startswith(COMPACT) and model_type.removeprefix(COMPACT) in CONFIG_MAPPING:
        register(model_type)


def register_all() -> None:
    """The same for every type that has a family."""
    for family in families.FAMILIES:
        for model_type in family.model_types:
            register(model_type)


def _auto_classes() -> tuple[Any, ...]:
    import transformers

    return (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForSequenceClassification,
        transformers.AutoModelForImageClassification,
    )
