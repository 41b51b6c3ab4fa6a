"""Put one of PEFT's tuners into a base model, with targets that the adapter's file names briefly and exactly."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from peftcli.config.errors import CheckFailed, Mistake, UserError
from peftcli.models import batch_norm

HALF = (torch.bfloat16, torch.float16)


def inject(model: nn.Module, config: Any, names: Iterable[str] | None = None) -> PeftModel:
    """Wrap the model; a classification head is trained and saved with the adapter.

    Args:
        model: The frozen base model.
        config: The tuner's configuration, without targets where `names` gives them.
        names: Full names of the modules to adapt; None leaves the targets to the configuration.

    Returns:
        The adapted model. What is trained is float32, whatever the type of the base: steps of a small learning rate
        would vanish in bfloat16's eight bits.

    Raises:
        UserError: The tuner cannot adapt what it was given.
    """
    if config.task_type is None:
        config.task_type = task_type(model)
    if names is not None:
        config.target_modules = compact(model, config, list(names))
    kind = getattr(config.peft_type, "value", config.peft_type)
    if whole := _saved_whole(model):
        if not hasattr(config, "modules_to_save"):
            what = f"PEFT's {kind} cannot train a head beside it, and pictures need one"
            raise UserError(Mistake(what, hint="take method=lora, or method=linear_probe"))
        config.modules_to_save = [*(config.modules_to_save or ()), *whole]
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 asks Transformers for a property that Transformers has renamed.
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = get_peft_model(model, config)
    except (UserError, CheckFailed, MemoryError):
        raise
    except Exception as error:  # each tuner fails in its own way
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        raise UserError(Mistake(f"PEFT's {kind} cannot be put into this model: {plain(error)}")) from error
    if has_head(model) and not _trains_head(wrapped):
        text = type(model).__name__.endswith("ForSequenceClassification")
        hint = "use task.head=label_words" if text else "leave the head out of method.targets, or take another method"
        raise UserError(Mistake(f"PEFT's {kind} cannot train a classification head", hint=hint))
    _train_in_float32(wrapped)
    return wrapped


def plain(error: Exception) -> str:
    """What an error of PEFT says; with its kind where the words alone are Python's rather than PEFT's."""
    said = str(error).strip()
    return said if said and isinstance(error, ValueError) else f"{type(error).__name__}: {said or 'no reason given'}"


def _trains_head(model: nn.Module) -> bool:
    return any(p.requires_grad and ".modules_to_save." in name for name, p in model.named_parameters())


def _train_in_float32(model: nn.Module) -> None:
    # PEFT does this for its tuners' own layers, and casts their inputs; not for modules that it trains whole.
    for module in model.modules():
        low = [p for p in module.parameters(recurse=False) if p.requires_grad and p.dtype in HALF]
        for parameter in low:
            parameter.data = parameter.data.float()
        if low and isinstance(module, nn.Linear):
            module.register_forward_pre_hook(_cast_input)


def _cast_input(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(x.to(module.weight.dtype) for x in inputs)


def has_head(model: nn.Module) -> bool:
    """Whether a classification head stands on top of the model, drawn for the run's labels."""
    named = type(model).__name__.endswith(("ForSequenceClassification", "ForImageClassification"))
    return named and any(True for _ in model.get_submodule(head_of(model)).parameters())


def head_of(model: nn.Module) -> str:
    """Name of the classification head: a linear layer, the last of a sequence in ResNet."""
    name = "score" if hasattr(model, "score") else "classifier"
    head = model.get_submodule(name)
    return f"{name}.{len(head) - 1}" if isinstance(head, nn.Sequential) else name


def _saved_whole(model: nn.Module) -> list[str]:
    """Modules that are trained and saved as they are where PEFT does not know of them: the head of a model of
    pictures, and each BatchNorm that is awake, with its statistics."""
    pictures = type(model).__name__.endswith("ForImageClassification")
    return ([head_of(model)] if pictures and has_head(model) else []) + batch_norm.awake(model)


def task_type(model: nn.Module) -> TaskType | None:
    """PEFT's name for what stands on top of the model."""
    name = type(model).__name__
    if name.endswith("ForSequenceClassification") and has_head(model):
        return TaskType.SEQ_CLS
    return TaskType.CAUSAL_LM if hasattr(model, "prepare_inputs_for_generation") else None


def compact(model: nn.Module, config: Any, names: list[str]) -> list[str]:
    """The shortest list of name endings that PEFT would match with exactly these modules of the untouched base.

    Args:
        model: The untouched base model.
        config: The configuration the targets are for; what it excludes or saves whole counts.
        names: Full module names.
    """
    everything = [name for name, _ in model.named_modules() if name]
    before = config.target_modules
    try:
        for depth in (1, 2):
            endings = sorted({".".join(name.split(".")[-depth:]) for name in names})
            config.target_modules = endings
            if {name for name in everything if _hit(config, name)} == set(names):
                return endings
    finally:
        config.target_modules = before
    return sorted(names)


def _hit(config: Any, name: str) -> bool:
    # PEFT says "excluded" with an object that is true as well.
    found = check_target_module_exists(config, name)
    return bool(found) and type(found).__name__ != "_ExcludedModule"
