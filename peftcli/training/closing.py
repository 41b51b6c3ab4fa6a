"""After the last step: quality of the tuned model and of what it is compared with, the saved adapter, the counts."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peftcli.artifacts import adapter, lineage
from peftcli.artifacts.run_folder import RunFolder
from peftcli.config.schema import RunConfig
from peftcli.models import packed, precision, roles
from peftcli.tasks.contract import Encoded, Evaluation, Quality
from peftcli.training import checks
from peftcli.training.prepare import Attached, Material, arithmetic, load_model
from peftcli.training.sharding import shard, sharded, whole_tensors

EXAMPLES = 200
"""Rows that the report shows one by one."""


@dataclass
class Measurer:
    """A function from the model to its metrics on a split.

    Every process measures the whole split: none waits for another, and all see the same numbers.
    """

    material: Material
    encoded: Encoded
    config: RunConfig
    accelerator: Accelerator

    def __call__(self, model: nn.Module) -> dict[str, float]:
        return _evaluate(model, self.material, self.encoded, self.config, self.accelerator, generate=False).metrics

    def use(self, encoded: Encoded) -> None:
        """Take the rows from here: the same ones in the same order, in another form."""
        self.encoded = encoded


def _evaluate(
    model: nn.Module, material: Material, encoded: Encoded, config: RunConfig, accelerator: Accelerator, generate: bool
) -> Evaluation:
    return material.task.evaluate(
        model, encoded, material.tokenizer, batch_size=config.training.eval_batch_size, device=accelerator.device,
        precision=arithmetic(config, accelerator), generate=generate,
    )  # fmt: skip


def evaluate(model: nn.Module, material: Material, config: RunConfig, accelerator: Accelerator) -> Evaluation:
    """The tuned model on the held-out split, with examples."""
    _, encoded = material.held_out
    if material.validation is not None:
        material.task.settle(
            model, material.validation, material.tokenizer, batch_size=config.training.eval_batch_size,
            device=accelerator.device, precision=arithmetic(config, accelerator),
        )  # fmt: skip
    if encoded is None:
        return Evaluation({})
    return _evaluate(model, material, encoded, config, accelerator, generate=True)


def untouched(attached: Attached, material: Material, config: RunConfig, accelerator: Accelerator) -> Evaluation | None:
    """The base as it was, on the held-out split; None where it has no answer of its own (a new head) or is not asked.

    The adapter is switched off where that was seen to give the base's outputs, else the base is loaded again.
    """
    _, encoded = material.held_out
    answers = _answers(material) or not getattr(attached.loaded.model, "head_is_drawn", True)
    if not config.training.baselines or encoded is None or not answers:
        return None
    if _undoes(attached, arithmetic(config, accelerator), accelerator.device):
        with attached.model.disable_adapter():
            return _evaluate(attached.model, material, encoded, config, accelerator, generate=True)
    attached.model.to("meta")
    base = load_model(config, material, accelerator)
    if sharded(config):
        shard(base.model, attached.method, accelerator.device, accelerator.num_processes, config.launch.offload)
    return _evaluate(base.model, material, encoded, config, accelerator, generate=True)


def at_start(attached: Attached, material: Material, config: RunConfig, accelerator: Accelerator) -> Evaluation | None:
    """The model as training found it, on the held-out split; None where that was the base."""
    _, encoded = material.held_out
    as_it_was = attached.method.at_start(attached.model)
    if encoded is None or as_it_was is None:
        return None
    with as_it_was as model:
        return _evaluate(model, material, encoded, config, accelerator, generate=True)


def _answers(material: Material) -> bool:
    return material.task.architecture == "causal-lm" or material.task.base_answers


def _undoes(attached: Attached, chosen: str, device: torch.device) -> bool:
    """Whether switching the adapter off gives the base's outputs, bit for bit."""
    if not hasattr(attached.model, "disable_adapter"):
        return False
    with attached.model.disable_adapter(), precision.autocast(chosen, device):
        return torch.equal(attached.before.cpu(), checks.outputs(attached.model, attached.probe).cpu())


def quality(
    material: Material, config: RunConfig, tuned: Evaluation, base: Evaluation | None, start: Evaluation | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The quality table and the rows that the report shows one by one, wrong ones first."""
    split, encoded = material.held_out
    measured = [] if base is None else [Quality("untouched base", base.metrics, base.intervals)]
    if config.training.baselines:
        measured += material.task.baselines(material.splits)
    measured += [] if start is None else [Quality("before training", start.metrics, start.intervals)]
    measured.append(Quality("tuned", tuned.metrics, tuned.intervals))
    table = {
        "metric": material.task.best_metric,
        "higher_is_better": material.task.higher_is_better,
        "unit": material.task.unit,
        "split": split,
        "rows_measured": 0 if encoded is None else len(encoded),
        "rows_generated": len(tuned.examples),
        "protocol": material.task.protocol(),
        "rows": [asdict(row) for row in measured],
        "answers": tuned.answers,
    }
    before = {e["row"]: e["predicted"] for e in base.examples} if base else {}
    examples = [
        {
            "row": e["row"],
            "input": e["input"],
            "expected": e["expected"],
            "base": before.get(e["row"]),
            "tuned": e["predicted"],
            "correct": e["correct"],
        }
        for e in sorted(tuned.examples, key=lambda e: bool(e["correct"]))
    ]
    return table, examples[:EXAMPLES]


def parameters(attached: Attached) -> dict[str, Any]:
    """Counts of all and of trained parameters, by role."""
    total: dict[str, int] = defaultdict(int)
    trained: dict[str, int] = defaultdict(int)
    modules: dict[str, set[str]] = defaultdict(set)
    wrappers = [
        n for n, m in attached.model.named_modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    entries = packed.entries(attached.model)
    for name, parameter in attached.model.named_parameters():
        role = roles.role_of(name, attached.loaded.family) or "other"
        total[role] += entries[name]
        trained[role] += entries[name] if parameter.requires_grad else 0
        if parameter.requires_grad:
            modules[role].add(next((w for w in wrappers if name.startswith(f"{w}.")), name.rpartition(".")[0]))
    return {
        "total": sum(total.values()),
        "trainable": sum(trained.values()),
        "by_role": [
            {"role": role, "modules": len(modules[role]), "total": total[role], "trainable": trained[role]}
            for role in sorted(total)
        ],
    }


def save(
    run: RunFolder, attached: Attached, material: Material, config: RunConfig, tuned: Evaluation, main: bool = True
) -> dict[str, Any]:
    """Write the adapter, or the whole model of a method that is no adapter; return its place and size.

    Where the model is cut up every process comes here, and the main one writes.
    """
    tensors = whole_tensors(attached.model, main) if sharded(config) and attached.method.saves == "model" else None
    if not main:
        return {}
    loaded, alarms = attached.loaded, getattr(material.task, "alarms", None)
    about = lineage.collect(
        attached.model, config, base_id=loaded.base_id, revision=loaded.revision,
        data_fingerprint=material.splits.fingerprint, base=attached.base, labels=material.task.labels,
        label_tokens=getattr(material.task, "words", None) or None, shots=material.task.shots,
        alarms=alarms and alarms.plain(),
    )  # fmt: skip
    metrics = {"tuned": tuned.metrics}
    if attached.method.saves == "adapter":
        pictures = material.task.architecture == "image-classification"
        adapter.save(attached.model, run.adapter, about, metrics, material.tokenizer if pictures else None)
        folder = run.adapter
    else:
        adapter.save_model(attached.model, material.tokenizer, run.model, about, metrics, tensors)
        folder = run.model
    return {"path": folder.name, "bytes": _bytes(folder)}


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
