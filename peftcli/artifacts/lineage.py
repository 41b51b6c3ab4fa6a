"""Where an adapter comes from: which base, by content; which data, config, seed and package version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.adaption_prompt import AdaptionPromptModel
from peft.tuners.adaption_prompt.layer import AdaptedAttention
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

import peftcli
from peftcli.config.errors import UserError
from peftcli.config.sample_kinds import BUNDLED_LICENCE
from peftcli.config.schema import RunConfig
from peftcli.data.samples import store
from peftcli.models import packed

NOT_THE_EXPERIMENT = ("name", "output", "launch", "tracker", "fetch")
"""Config keys that say where and how a run was made, not what it computes."""


def collect(
    model: nn.Module,
    config: RunConfig,
    *,
    base_id: str,
    revision: str | None,
    data_fingerprint: str,
    labels: list[str] | None = None,
    label_tokens: list[int] | None = None,
    shots: list[str] | None = None,
    alarms: dict[str, Any] | None = None,
    base: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The lineage of a trained adapter.

    Args:
        model: The model with the adapter in it.
        config: The run's config.
        base_id: Name of the base model; no path of this machine.
        revision: Its revision, where it has one.
        data_fingerprint: Of the rows it was trained on.
        labels: The label set in the order that the model has learnt, of a task that has one.
        label_tokens: The token whose score after the prompt is that of each label, where label words are scored.
        shots: Training rows as text that stand before each prompt, of a task that has some.
        alarms: Of a task that looks for one label, which and what decides: `peftcli.tasks.images.alarms`.
        base: `digests` taken before the adapter was attached, where the method rearranges the base; more than the
            adapted tensors may be in it. A whole model that was trained has no base left to hash: without this, the
            lineage of one says nothing about its base's weights.
    """
    if base is not None:
        base = {name: base[name] for name in adapted(model)} if isinstance(model, PeftModel) else base
    else:
        base = digests(model, adapted(model)) if isinstance(model, PeftModel) else {}
    return {
        "package": "peftcli",
        "package_version": peftcli.__version__,
        "base": {
            "id": base_id,
            "source": config.model.source,
            "revision": revision,
            "hash": combined(base) if base else None,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "quantization": packed.kind(model),
            "tensors": base,
        },
        "method": config.method.name,
        "data_fingerprint": data_fingerprint,
        "labels": labels,
        "label_tokens": label_tokens,
        "shots": shots or [],
        "alarms": alarms,
        "task": asdict(config.task),
        "licences": {
            "base": _licence(config.model.name, config.model.source),
            "data": _licence(config.data.name, config.data.source),
        },
        "config_hash": config_hash(config),
        "seed": config.seed,
    }


def adapted(model: nn.Module) -> list[str]:
    """Names, as in the untouched base, of the base tensors that an adapter sits on; all of them where it sits on none.

    Modules that the adapter replaces whole (a new head) are left out: the base's own are never used.
    """
    prefix = _prefix(model)
    modules = [(name.removeprefix(prefix) + ".", module) for name, module in model.named_modules()]
    on = tuple(name for name, module in modules if isinstance(module, BaseTunerLayer))
    replaced = tuple(
        name for name, module in modules if isinstance(module, AuxiliaryTrainingWrapper | AdaptedAttention)
    )
    tensors = list(base_tensors(model))
    chosen = [name for name in tensors if name.startswith(on)] or tensors
    return sorted(name for name in chosen if not name.startswith(replaced))


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The base's tensors by their names in the untouched base, whether or not an adapter is wrapped around them."""
    prefix = _prefix(model)
    layers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        in_adapter = name.startswith(layers) and ".base_layer." not in name
        if name.startswith(prefix) and not in_adapter and ".modules_to_save." not in name:
            plain = name.removeprefix(prefix).replace(".base_layer.", ".").replace(".original_module.", ".")
            tensors[plain] = tensor
    return tensors


def digests(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, str]:
    """SHA-256 of each named base tensor, of all where none is named; a name that the base lacks gets an empty digest.

    Tensors are rounded to bfloat16 first, so a base loaded in float32 and in bfloat16 has the same digests. Of matrices
    in few bits, these bits and their scales are looked at as they are.
    """
    tensors = base_tensors(model)
    return {
        name: _digest(tensors[name]) if name in tensors else "" for name in sorted(tensors if names is None else names)
    }


def combined(tensor_digests: dict[str, str]) -> str:
    """One hash of many digests, by sorted name."""
    whole = hashlib.sha256()
    for name, digest in sorted(tensor_digests.items()):
        whole.update(f"{name} {digest}\n".encode())
    return whole.hexdigest()


def config_hash(config: RunConfig) -> str:
    """Hash of what a run computes; how it is launched and in which folders its inputs and outputs are do not count."""
    tree = {key: value for key, value in asdict(config).items() if key not in NOT_THE_EXPERIMENT}
    del tree["data"]["files"]  # the rows have a fingerprint of their own in the lineage, the base a hash
    if config.model.source == "folder":
        tree["model"]["name"] = Path(config.model.name).name
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _licence(name: str | None, source: str) -> str | None:
    """The licence of a sample, where it states one, and of what is bundled; None for anything else."""
    if source == "bundled":
        return BUNDLED_LICENCE
    if source != "sample" or not name:
        return None
    try:
        return store.record(name).get("licence") or None
    except (UserError, OSError, ValueError):
        return None


def _digest(tensor: Tensor) -> str:
    tensor = tensor.detach()
    if tensor.is_floating_point():
        tensor = tensor.to(torch.bfloat16)
    content = hashlib.sha256(str(tuple(tensor.shape)).encode())
    if tensor.numel():
        content.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def _prefix(model: nn.Module) -> str:
    """What PEFT puts before the base's own names."""
    if not isinstance(model, PeftModel):
        return ""
    return "base_model.model." if isinstance(model.base_model, BaseTuner | AdaptionPromptModel) else "base_model."
