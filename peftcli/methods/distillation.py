"""A model that learns from the one it was made from: from its scores and from what its blocks put out.

    loss = (1 - w) task + w T² KL(teacher || student) + f mean over blocks |y - y'|² / |y'|²

Each term is a sum over the positions of the task's loss, so that neither micro-batches nor processes change it: the
scores and the blocks' outputs y at the positions that are learnt, or for one answer a row those of the whole row. The
division by |y'|² makes blocks count alike (ours). Scores of temperature T and the factor T² are Hinton et al.'s (arXiv
1503.02531). Where a row may have several labels, each is a choice of its own, and KL the mean over them.

S supervised positions, V words or classes, K labels, D width, N positions or rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftcli.config.errors import Mistake, UserError
from peftcli.methods import contract
from peftcli.methods.contract import Stage
from peftcli.methods.passes import Pass, Places, first, hooked
from peftcli.methods.rowcol.settings import Distill
from peftcli.models.family import Family
from peftcli.models.loading import SEVERAL
from peftcli.models.positions import select

CHUNK = 2**20
"""Scores turned to fp32 at once."""
TINY = 1e-12
"""Below this a teacher's squared outputs count as this much."""


class _Divergence(torch.autograd.Function):
    """The gradient is made on the way forward: the task's loss may use the same scores up on the way back."""

    @staticmethod
    def forward(ctx: Any, student_SV: Tensor, teacher_SV: Tensor, temperature: float) -> Tensor:
        kind = torch.promote_types(student_SV.dtype, torch.float32)
        total, gradient_SV = torch.zeros((), dtype=kind, device=student_SV.device), torch.empty_like(student_SV)
        size = max(1, CHUNK // max(student_SV.shape[1], 1))
        for at in range(0, len(student_SV), size):
            part = slice(at, at + size)
            ours, theirs = ((t[part].to(kind) / temperature).log_softmax(-1) for t in (student_SV, teacher_SV))
            total += temperature**2 * (theirs.exp() * (theirs - ours)).sum()
            gradient_SV[part] = temperature * (ours.exp() - theirs.exp())
        ctx.save_for_backward(gradient_SV)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient_SV,) = ctx.saved_tensors
        return gradient_SV * grad.to(gradient_SV.dtype), None, None


def divergence(student_SV: Tensor, teacher_SV: Tensor, temperature: float) -> Tensor:
    """T² KL(softmax(teacher / T) || softmax(student / T)), summed over positions: fp32 (fp64 of fp64 scores)."""
    return _Divergence.apply(student_SV, teacher_SV, temperature)


def label_divergence(student_SK: Tensor, teacher_SK: Tensor, temperature: float) -> Tensor:
    """The same of labels that may stand together: T² KL of sigmoid(score / T), present or absent, the mean over labels
    and the sum over positions, as the task's loss is."""
    # A sigmoid is the softmax of a score beside 0.
    ours, theirs = (torch.stack([t, torch.zeros_like(t)], -1).flatten(0, 1) for t in (student_SK, teacher_SK))
    return divergence(ours, theirs, temperature) / student_SK.shape[1]


def difference(y_ND: Tensor, target_ND: Tensor) -> Tensor:
    """|y - y'|² / |y'|² of each position or row, summed over them, in fp32 (fp64)."""
    kind = torch.promote_types(y_ND.dtype, torch.float32)
    y_ND, target_ND = y_ND.to(kind).flatten(1), target_ND.to(kind).flatten(1)
    return ((y_ND - target_ND).square().sum(1) / target_ND.square().sum(1).clamp_min(TINY)).sum()


def blocks_of(model: nn.Module, family: Family) -> list[str]:
    """Full names of the model's blocks, in its order."""
    pattern = re.compile(rf"(?:.*\.)?(?:{family.blocks})") if family.blocks else None
    return [name for name, _ in model.named_modules() if pattern and pattern.fullmatch(name)]


class Distillation:
    """Compares a model with its teacher in the pass that the model makes for the task's loss.

    Args:
        settings: What is compared, and how much it counts.
        teacher: The model as it was: frozen, in evaluation mode. Its blocks have the student's names.
        blocks: Names of the blocks whose outputs are compared.
        scores: Whether the teacher's scores are worth learning; not those of a head that was drawn just now.
    """

    def __init__(self, settings: Distill, teacher: nn.Module, blocks: Sequence[str], scores: bool = True):
        self.settings, self.teacher, self.blocks = settings, teacher.requires_grad_(False).eval(), list(blocks)
        self.weight = settings.weight if scores else 0.0
        config: Any = teacher.config
        self._divergence = label_divergence if config.problem_type == SEVERAL else divergence
        self.alone = False
        """Whether each block learns by itself now, from the teacher's inputs to it."""
        self.told: dict[str, float] = {}
        self._student: Pass | None = None
        self._handles: list[Any] = []

    def watch(self, model: nn.Module) -> None:
        """Look at the passes of a model in training, once for all."""
        if not self._handles:
            self._handles = list(hooked(model, self.blocks, self._keep, training=True))

    def leave(self) -> None:
        """Look no longer."""
        while self._handles:
            self._handles.pop().remove()
        self._student = None

    def _keep(self, seen: Pass) -> None:
        self._student = seen

    def loss(self, model: nn.Module, batch: dict[str, Tensor], task_loss: Tensor) -> Tensor:
        """What to minimise after the model's pass over a batch; sums, as the task's loss is one.

        Args:
            model: The student, which was watched.
            batch: The batch of that pass.
            task_loss: Summed over the supervised positions.
        """
        student, self._student = self._student, None
        assert student is not None, "the model has not seen the batch"
        places = Places.of(student, batch["labels"])
        taught = self._asked(student)
        if self.alone:
            found = {"blocks": self._by_block(model, taught, places)}
            loss = found["blocks"]
        else:
            found = {"task": task_loss, **self._terms(student, taught, places)}
            loss = (1 - self.weight) * task_loss + self.weight * found.get("kl", 0.0)
            loss = loss + self.settings.features * found.get("blocks", 0.0)
        self._tell({**found, "positions": places.count})
        return loss

    def _terms(self, student: Pass, taught: Pass, places: Places) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if self.weight:
            ours, theirs = places.logits(student.logits), places.logits(taught.logits)
            found["kl"] = self._divergence(ours, theirs, self.settings.temperature)
        if self.settings.features and self.blocks:
            parts = (
                difference(places.outputs(student.blocks[name][2]), places.outputs(taught.blocks[name][2]))
                for name in self.blocks
            )
            found["blocks"] = torch.stack(list(parts)).mean()
        return found

    def _by_block(self, model: nn.Module, taught: Pass, places: Places) -> Tensor:
        parts = []
        for name in self.blocks:
            args, kwargs, target = taught.blocks[name]
            y = first(model.get_submodule(name)(*args, **kwargs))
            parts.append(difference(places.outputs(y), places.outputs(target)))
        return torch.stack(parts).mean()

    def _asked(self, student: Pass) -> Pass:
        """The teacher's pass over what the student saw."""
        args, kwargs = student.inputs
        passes: list[Pass] = []
        handles = list(hooked(self.teacher, self.blocks, passes.append))
        try:
            with torch.no_grad():
                if student.mask_BL is None:
                    self.teacher(*args, **kwargs)
                else:
                    with select(self.teacher, student.mask_BL):
                        self.teacher(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return passes[0]

    def _tell(self, found: dict[str, Tensor]) -> None:
        for name, value in found.items():
            self.told[name] = self.told.get(name, 0.0) + value.item()

    def log(self) -> dict[str, float]:
        """Means of the terms since the last call, over this process's positions."""
        told, self.told = self.told, {}
        positions = max(told.pop("positions", 0.0), 1.0)
        return {f"distil_{name}": value / positions for name, value in told.items()}


class Distilled(contract.Method):
    """A method that rebuilds a model, which then learns as a whole from what it was made from; its settings have
    `distill`.

    `attach` ends with `taught_by`. First `layerwise_steps` for the blocks alone, each from the teacher's inputs to its
    outputs; then all that is trained, end to end.
    """

    capabilities = contract.Capabilities(
        merges=False,
        unloads=False,
        several_adapters=False,
        identity_at_start=False,
        layers=frozenset({"linear", "conv2d"}),
    )
    saves = "model"

    def __init__(self, settings: Any):
        super().__init__(settings)
        self.distillation: Distillation | None = None
        self._trained: list[str] = []

    def taught_by(self, model: nn.Module, teacher: nn.Module, blocks: Sequence[str]) -> None:
        """Name the teacher.

        Args:
            model: The student, with just what is trained requiring a gradient.
            teacher: A copy of the original, made before anything in it was changed.
            blocks: Names of modules that take and give the same in both.
        """
        settings: Distill = self.settings.distill
        drawn = getattr(teacher, "head_is_drawn", False)
        self._trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if drawn and settings.weight:
            what = "the head is new, so there are no scores to learn from: method.distill.weight counts as 0"
            self.notes.append(what + (", and the blocks' outputs are compared" if settings.features else ""))
        if settings.layerwise_steps or settings.features or (settings.weight and not drawn):
            self.distillation = Distillation(settings, teacher, blocks, scores=not drawn)

    def stages(self, total_steps: int) -> list[Stage]:
        """Block by block, then end to end; none where the recipe asks for no step.

        Raises:
            UserError: The first takes all the steps there are.
        """
        if not total_steps:
            return []
        asked = self.settings.distill.layerwise_steps
        first = round(asked * total_steps) if isinstance(asked, float) else asked
        if first >= total_steps and first:
            what = f"method.distill.layerwise_steps={asked} leaves none of {total_steps} steps to train end to end"
            raise UserError(Mistake(what, "method.distill.layerwise_steps", hint=f"at most {total_steps - 1}"))
        rest = Stage("train", total_steps - first, self._together)
        return [Stage("blocks", first, self._by_block, measured=False), rest] if first else [rest]

    def _by_block(self, model: nn.Module) -> None:
        assert self.distillation is not None
        self.distillation.alone = True
        self.distillation.watch(model)
        model.requires_grad_(False)
        inside = {p for name in self.distillation.blocks for p in model.get_submodule(name).parameters()}
        for name in self._trained:
            parameter = model.get_parameter(name)
            parameter.requires_grad_(parameter in inside)

    def _together(self, model: nn.Module) -> None:
        for name in self._trained:
            model.get_parameter(name).requires_grad_(True)
        if self.distillation:
            self.distillation.alone = False
            self.distillation.watch(model)

    def batch_loss(self, model: nn.Module, batch: dict[str, Tensor], loss: Tensor) -> Tensor:
        """See the contract."""
        return loss if self.distillation is None else self.distillation.loss(model, batch, loss)

    def beside(self) -> list[nn.Module]:
        """The teacher."""
        return [] if self.distillation is None else [self.distillation.teacher]

    def log(self, model: nn.Module) -> dict[str, float]:
        """The terms of the loss, each a mean."""
        return {} if self.distillation is None else self.distillation.log()

    def finish(self, model: nn.Module) -> None:
        """Let the teacher go."""
        if self.distillation:
            self.distillation.leave()
        self.distillation = None
