"""Learning from the original: exact terms, the right positions, sums that micro-batches cannot change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from peftcli.config.errors import UserError
from peftcli.methods.distillation import Distillation, blocks_of, difference, divergence, label_divergence
from peftcli.methods.rowcol.settings import Distill, Settings
from peftcli.methods.rowcol.tuner import Method
from peftcli.models.loading import SEVERAL
from peftcli.models.positions import select
from peftcli.testing import tiny
from peftcli.testing.rows import nudge

SHARP = {"atol": 1e-12, "rtol": 1e-10}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_of(base: tiny.Base) -> torch.Tensor:
    """As the tasks give them: a word each position, or shares of classes."""
    if base.targets.dim() == 2:
        return functional.pad(base.targets[:, :-1], (1, 0), value=-100)
    return functional.one_hot(base.targets, tiny.LABELS).double()


def task_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Summed cross-entropy, computed as the tasks do it."""
    labels, inputs = batch["labels"], {name: value for name, value in batch.items() if name != "labels"}
    if "pixel_values" in batch:
        learnt = labels[:, 0] != -100
        return -(labels * model(**inputs).logits.log_softmax(1)).sum(1)[learnt].sum()
    next_BL = functional.pad(labels[:, 1:], (0, 1), value=-100)
    with select(model, next_BL != -100):
        logits = model(**inputs).logits.flatten(0, -2)
    return functional.cross_entropy(logits, next_BL[next_BL != -100], reduction="sum")


def taught(made: Any, **settings: Any) -> tuple[tiny.Base, Any, Distillation, dict[str, torch.Tensor]]:
    """A model that has moved away from its teacher."""
    base = made()
    model = copy.deepcopy(base.model).requires_grad_(True)
    nudge(model)
    found = Distillation(Distill(**settings), base.model, blocks_of(model, base.family))
    found.watch(model.train())
    return base, model, found, {**base.batch, "labels": labels_of(base)}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_divergence_and_its_gradient(temperature):
    ours, theirs = drawn(5, 7).requires_grad_(True), drawn(5, 7, seed=1)
    logs = [(t / temperature).log_softmax(1) for t in (ours, theirs)]
    expected = temperature**2 * functional.kl_div(*logs, reduction="sum", log_target=True)
    torch.testing.assert_close(divergence(ours, theirs, temperature), expected, **SHARP)
    assert torch.autograd.gradcheck(lambda t: divergence(t, theirs, temperature), ours)
    assert divergence(theirs, theirs, temperature) == 0
    assert divergence(ours[:0], theirs[:0], temperature) == 0


def by_label(ours: torch.Tensor, theirs: torch.Tensor, T: float) -> torch.Tensor:
    """KL of present or absent, label by label, as it is written in books."""
    p, q = torch.sigmoid(theirs / T), torch.sigmoid(ours / T)
    return T**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean(1).sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_labels_that_may_stand_together(temperature):
    ours, theirs = drawn(5, 7).requires_grad_(True), drawn(5, 7, seed=1)
    found = label_divergence(ours, theirs, temperature)
    torch.testing.assert_close(found, by_label(ours, theirs, temperature), **SHARP)
    gradients = [torch.autograd.grad(loss, ours)[0] for loss in (found, by_label(ours, theirs, temperature))]
    torch.testing.assert_close(*gradients, **SHARP)
    assert label_divergence(theirs, theirs, temperature) == 0
    assert label_divergence(ours[:0], theirs[:0], temperature) == 0
    # All scores moved by as much are the same classes, and other labels.
    assert divergence(theirs + 3, theirs, temperature).abs() < 1e-12 < label_divergence(theirs + 3, theirs, temperature)
    assert label_divergence(torch.full((1, 2), 1e4), torch.full((1, 2), -1e4), temperature).isfinite()


def test_several_labels_are_compared_one_by_one():
    made = tiny.vit()
    made.model.config.problem_type = SEVERAL
    base, model, found, batch = taught(lambda: made, weight=0.25, temperature=3.0, features=0.0)
    batch["labels"] = torch.ones_like(batch["labels"])
    ours, theirs = model(**base.batch).logits, base.model(**base.batch).logits
    loss = found.loss(model, batch, torch.zeros(()))
    torch.testing.assert_close(loss, 0.25 * by_label(ours, theirs, 3.0), **SHARP)


def test_scores_that_the_tasks_loss_uses_up():
    """Which overwrites them on the way back, before or after the divergence comes to its own."""
    from peftcli.tasks.loss import cross_entropy_sum

    hidden, weight, theirs, targets = drawn(5, 3), drawn(7, 3, seed=1), drawn(5, 7, seed=2), torch.arange(5)
    gradients = []
    for loss in (cross_entropy_sum, lambda *args: functional.cross_entropy(*args, reduction="sum")):
        W = weight.clone().requires_grad_(True)
        logits = hidden @ W.T
        (0.5 * loss(logits, targets) + 0.5 * divergence(logits, theirs, 2.0)).backward()
        gradients.append(W.grad)
    torch.testing.assert_close(*gradients, **SHARP)


def test_a_difference_is_relative():
    y, target = drawn(4, 3, 2), drawn(4, 3, 2, seed=1)
    expected = ((y - target) ** 2).sum((1, 2)) / (target**2).sum((1, 2))
    torch.testing.assert_close(difference(y, target), expected.sum(), **SHARP)
    torch.testing.assert_close(difference(3 * y, 3 * target), expected.sum(), **SHARP)
    assert difference(target, target) == 0


@pytest.mark.parametrize("made", [tiny.llama, tiny.mamba, tiny.vit, tiny.resnet])
def test_all_terms_at_the_positions_that_are_learnt(made):
    base, model, found, batch = taught(made, weight=0.25, temperature=3.0, features=0.5)
    task = task_loss(model, batch)
    loss = found.loss(model, batch, task)
    outputs = []
    for one in (base.model, model):
        seen: dict[str, torch.Tensor] = {}
        handles = [
            one.get_submodule(name).register_forward_hook(
                lambda _, __, out, name=name, seen=seen: seen.update({name: out if torch.is_tensor(out) else out[0]})
            )
            for name in found.blocks
        ]
        outputs.append((one(**base.batch).logits, seen))
        for handle in handles:
            handle.remove()
    (theirs, their_blocks), (ours, our_blocks) = outputs
    keep = base.targets != -100
    T = 3.0
    logs = [(t[keep] / T).log_softmax(-1) for t in (ours, theirs)]
    expected = 0.75 * task + 0.25 * T**2 * functional.kl_div(*logs, reduction="sum", log_target=True)
    parts = []
    for name in found.blocks:
        y, target = our_blocks[name][keep].flatten(1), their_blocks[name][keep].flatten(1)
        parts.append((((y - target) ** 2).sum(1) / (target**2).sum(1)).sum())
    assert len(parts) >= 2
    torch.testing.assert_close(loss, expected + 0.5 * sum(parts) / len(parts), **SHARP)
    told = found.log()
    assert told["distil_task"] == pytest.approx(task.item() / keep.sum().item())
    assert found.log() == {}


def test_one_answer_a_row_compares_rows_without_their_padding():
    base = tiny.llama(architecture="sequence-classification")
    model = copy.deepcopy(base.model).requires_grad_(True)
    nudge(model)
    found = Distillation(Distill(weight=0.0), base.model, blocks_of(model, base.family))
    found.watch(model.train())
    labels = torch.full_like(base.batch["input_ids"], -100)
    labels[0, -1], labels[1, 4] = base.targets
    losses = []
    for padding in (0, 3):
        wide = {name: functional.pad(value, (0, padding)) for name, value in base.batch.items()}
        model(**wide)
        padded = functional.pad(labels, (0, padding), value=-100)
        losses.append(found.loss(model, {**wide, "labels": padded}, torch.zeros(())))
    torch.testing.assert_close(*losses, **SHARP)


@pytest.mark.parametrize("made", [tiny.llama, tiny.vit, tiny.resnet])
@pytest.mark.parametrize("alone", [False, True])
def test_a_model_like_its_teacher_has_nothing_to_learn(made, alone):
    base = made()
    model = copy.deepcopy(base.model).requires_grad_(True)
    found = Distillation(Distill(weight=1.0), base.model, blocks_of(model, base.family))
    found.watch(model.train())
    found.alone = alone
    batch = {**base.batch, "labels": labels_of(base)}
    loss = found.loss(model, batch, task_loss(model, batch))
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-12 for p in model.parameters())
    assert not any(p.requires_grad for p in base.model.parameters())


@pytest.mark.parametrize("made", [tiny.llama, tiny.vit])
@pytest.mark.parametrize("alone", [False, True])
def test_micro_batches_and_rows_without_labels_change_nothing(made, alone):
    _, model, found, batch = taught(made)
    found.alone = alone

    def gradients(batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        model.zero_grad()
        for part in batches:
            found.loss(model, part, task_loss(model, part)).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole = gradients([batch])
    rows = [{name: value[at : at + 1] for name, value in batch.items()} for at in range(len(batch["labels"]))]
    blank = {name: torch.full_like(value, -100) if name == "labels" else value for name, value in rows[0].items()}
    for other in (gradients(rows), gradients([*rows, blank])):
        for mine, theirs in zip(whole, other, strict=True):
            torch.testing.assert_close(mine, theirs, **SHARP)


def test_recomputed_blocks_have_the_same_gradient():
    _, model, found, batch = taught(tiny.llama)
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        found.loss(model, batch, task_loss(model, batch)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, **SHARP)


def test_each_block_alone_learns_from_the_teachers_inputs():
    _, model, found, batch = taught(tiny.vit)
    found.alone = True
    found.loss(model, batch, task_loss(model, batch)).backward()
    last = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert all(".layers." in name for name in last)
    with torch.no_grad():
        for p in model.get_submodule(found.blocks[0]).parameters():
            p.zero_()
    model.zero_grad()
    found.loss(model, batch, task_loss(model, batch)).backward()
    for name, gradient in last.items():
        if name.startswith(found.blocks[1]):
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, **SHARP)


@pytest.mark.parametrize("made", [tiny.vit, tiny.llama])
def test_a_tied_model_comes_nearer_to_what_it_was(made):
    base, untouched = made(torch.float32), made(torch.float32)
    method = Method(Settings(mode="tie", distill=Distill(weight=1.0, layerwise_steps=10)))
    model = method.attach(base.model, base.family).train()
    batch = {**base.batch, "labels": labels_of(base).to(base.batch.get("pixel_values", base.targets).dtype)}
    teacher = untouched.outputs(untouched.model)

    def gap() -> float:
        with torch.no_grad():
            return (untouched.outputs(model.eval()) - teacher).square().mean().item()

    gaps, names = [gap()], []
    for stage in method.stages(40):
        stage.start(model.train())
        learning = [p for p in model.parameters() if p.requires_grad]
        names.append(len(learning))
        optimiser = torch.optim.AdamW(learning, lr=3e-3)
        for _ in range(stage.steps):
            optimiser.zero_grad()
            method.batch_loss(model, batch, task_loss(model.train(), batch)).backward()
            optimiser.step()
        gaps.append(gap())
    assert gaps[2] < gaps[1] < gaps[0]
    assert names[0] < names[1]
    method.finish(model)
    assert method.beside() == []
    assert not model._forward_hooks
    assert not any(module._forward_hooks for module in model.modules())


def test_the_papers_layout_learns_from_whole_stages():
    base = tiny.resnet_awake(torch.float32)
    method = Method(Settings(mode="tie", layout="halvit"))
    model = method.attach(base.model, base.family)
    assert method.distillation.blocks[-1].endswith("stages.1")
    [stage] = method.stages(3)
    stage.start(model.train())
    batch = {**base.batch, "labels": labels_of(base).float()}
    method.batch_loss(model, batch, task_loss(model, batch)).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_what_a_new_head_says_is_not_learnt():
    base = tiny.vit(torch.float32)
    base.model.head_is_drawn = True
    method = Method(Settings(mode="tie"))
    method.attach(base.model, base.family)
    assert method.distillation.weight == 0
    assert "the head is new" in method.notes[-1]
    other = tiny.vit(torch.float32)
    other.model.head_is_drawn = True
    scores = Method(Settings(mode="tie", distill=Distill(features=0.0)))
    scores.attach(other.model, other.family)
    assert scores.beside() == []


def test_steps_for_blocks_alone_leave_some_for_all():
    method = Method(Settings(mode="tie", distill=Distill(layerwise_steps=3)))
    assert [stage.steps for stage in method.stages(5)] == [3, 2]
    share = Method(Settings(mode="tie", distill=Distill(layerwise_steps=0.25)))
    assert [[stage.steps for stage in share.stages(total)] for total in (8, 2)] == [[2, 6], [2]]
    with pytest.raises(UserError, match=r"layerwise_steps=3 leaves none of 3 steps"):
        method.stages(3)


def test_without_any_term_there_is_no_teacher():
    base = tiny.vit(torch.float32)
    method = Method(Settings(mode="tie", distill=Distill(weight=0.0, features=0.0)))
    model = method.attach(base.model, base.family)
    assert method.beside() == []
    [stage] = method.stages(3)
    stage.start(model)
    loss = torch.ones(())
    assert method.batch_loss(model, {}, loss) is loss
