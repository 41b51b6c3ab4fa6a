"""SMAT on tiny ViT, ResNet, LLaMA and Mamba: identity, rollback, gradients, training, files, what depends on what."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from peftcli.config.errors import UserError
from peftcli.config.schema import OptimConfig
from peftcli.methods import episodes
from peftcli.methods.lora.settings import Settings as LoraSettings
from peftcli.methods.lora.tuner import Method as LoraMethod
from peftcli.methods.smat import maths, training
from peftcli.methods.smat.settings import Settings
from peftcli.methods.smat.tuner import Method
from peftcli.testing.rows import nudge, trained
from peftcli.testing.tiny import Base
from peftcli.training import optimiser
from tests.few_shot import KINDS, episode, headless

STEPS = 4


def attached(kind: str = "vit", dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[Base, Any, Method]:
    base, method = headless(kind, dtype), Method(Settings(**{"experts": 3, **settings}))
    torch.manual_seed(0)
    model = method.attach(base.model, base.family)
    for stage in method.stages(STEPS)[:1]:
        stage.start(model)
    return headless(kind, dtype), model.eval(), method


def train(model: Any, method: Method, kind: str, steps: int = STEPS, first: int = 1) -> None:
    groups = method.parameter_groups(model)
    moved = optimiser.build(OptimConfig(lr=1e-2), model, groups)
    model.train()
    for step in range(first, first + steps):
        torch.manual_seed(step)
        optimiser.set_rate(moved, OptimConfig(lr=1e-2, schedule="constant", warmup_share=0), 0, 1)
        episodes.loss(model, episode(kind, seed=step, dtype=next(model.parameters()).dtype)).backward()
        moved.step()
        method.after_step(model, step)
        moved.zero_grad()
    model.eval()


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def test_starts_as_the_base_whatever_the_experts(kind) -> None:
    base, model, _ = attached(kind)
    task = episode(kind)
    with torch.no_grad():
        with model.for_support(*_support(task), task.ways):
            found = model(**base.batch).logits
        assert torch.equal(found, base.model(**base.batch).logits)
    torch.testing.assert_close(episodes.logits(model, task), episodes.logits(base.model, task), rtol=0, atol=1e-12)


def test_switched_off_and_unloaded_it_is_the_base_bit_for_bit(kind) -> None:
    base, model, method = attached(kind)
    nudge(model)
    train(model, method, kind)
    expected = base.model(**base.batch).logits
    task = episode(kind)
    with model.disable_adapter():
        assert torch.equal(model(**base.batch).logits, expected)
        assert torch.equal(episodes.logits(model, task), episodes.logits(base.model, task))
    assert not torch.equal(episodes.logits(model, task), episodes.logits(base.model, task))
    unloaded = model.unload()
    state = base.model.state_dict()
    assert unloaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in unloaded.state_dict().items())


def test_weights_of_a_task_are_the_equation(kind) -> None:
    base, model, _ = attached(kind)
    nudge(model, size=0.3)
    tuner, task = model.base_model, episode(kind)
    found = tuner.task_weights(*_support(task), task.ways)
    alpha_M, masks_KM = tuner.experts, tuner.masks()
    own = dict(base.model.named_parameters())
    for name, weight in found.items():
        z = [tuner.state.layouts["default"].gates(masks_KM[:, m])[name] for m in range(3)]
        by_hand = own[name] + sum(alpha_M[m] * z[m] * tuner.state.delta("default", name) for m in range(3))
        torch.testing.assert_close(weight, by_hand, rtol=0, atol=1e-12)


def test_every_trained_tensor_learns_is_in_one_group_and_nothing_else_moves(kind) -> None:
    base, model, method = attached(kind)
    nudge(model)
    names = [name for group in method.parameter_groups(model) for name in group["names"]]
    assert sorted(names) == sorted(trained(model))
    model.train()
    episodes.loss(model, episode(kind)).backward()
    dead = [name for name, p in trained(model).items() if p.grad is None or not p.grad.any()]
    assert not dead
    model.zero_grad()
    before = copy.deepcopy(model.state_dict())
    train(model, method, kind)
    state = base.model.state_dict()
    for name, tensor in model.state_dict().items():
        plain = name.removeprefix("base_model.model.")
        if plain in state:
            assert torch.equal(tensor, state[plain]), name
        else:
            assert not torch.equal(tensor, before[name]), name


def test_predictions_depend_on_no_order(kind) -> None:
    _, model, _ = attached(kind)
    nudge(model, size=0.2)
    task = episode(kind)
    plain = episodes.logits(model, task)
    weights = model.experts
    rows = torch.cat([torch.randperm(9, generator=torch.Generator().manual_seed(1)), torch.arange(9, 15)])
    shuffled = replace(task, inputs={n: v[rows] for n, v in task.inputs.items()}, classes_N=task.classes_N[rows])
    torch.testing.assert_close(episodes.logits(model, shuffled), plain, rtol=0, atol=1e-9)
    torch.testing.assert_close(model.experts, weights, rtol=0, atol=1e-12)
    renamed = torch.tensor([2, 0, 1])
    again = episodes.logits(model, replace(task, classes_N=renamed[task.classes_N]))
    torch.testing.assert_close(again[:, renamed], plain, rtol=0, atol=1e-9)
    torch.testing.assert_close(model.experts, weights, rtol=0, atol=1e-12)


def test_saved_and_read_it_answers_the_same(kind, tmp_path: Path) -> None:
    _, model, method = attached(kind, torch.float32, sparsity=0.5)
    nudge(model, size=0.2)
    train(model, method, kind)
    method.finish(model)
    task = episode(kind, dtype=torch.float32)
    with torch.no_grad():
        expected = episodes.logits(model, task)
        weights = model.experts
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(headless(kind, torch.float32).model, tmp_path).eval()
        assert torch.equal(episodes.logits(again, task), expected)
    assert torch.equal(again.experts, weights)
    assert {"delta", "logits", "multipliers", "router"} == {
        name.split("smat_")[1].split(".")[0] for name in load_file(tmp_path / "adapter_model.safetensors")
    }


def test_the_merged_model_is_plain_and_answers_the_same(kind) -> None:
    base, model, _ = attached(kind)
    nudge(model, size=0.2)
    task = episode(kind)
    expected = episodes.logits(model, task)
    merged = model.merge_for(*_support(task), task.ways)
    assert type(merged) is type(base.model)
    assert sum(p.numel() for p in merged.parameters()) == sum(p.numel() for p in base.model.parameters())
    assert merged.state_dict().keys() == base.model.state_dict().keys()
    torch.testing.assert_close(episodes.logits(merged, task), expected, rtol=0, atol=1e-9)
    buffers = dict(base.model.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in merged.named_buffers())


def test_gradients_of_the_loss_match_finite_differences() -> None:
    _, model, _ = attached(inner_lr=0.0, teacher_steps=0)
    nudge(model)
    task = episode("vit")
    state = model.base_model.state
    state.smat_multipliers["default"].data.add_(0.5)
    episodes.loss(model, task).backward()
    dice = torch.Generator().manual_seed(2)
    for name, parameter in trained(model).items():
        if "multipliers" in name or "logits" in name or "router" in name:
            continue  # the constraints hold parts of these on purpose
        direction = torch.randn(parameter.shape, generator=dice, dtype=parameter.dtype)
        slopes = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-5 * direction
            slopes.append(float(episodes.loss(model, task).detach()))
            with torch.no_grad():
                parameter -= sign * 1e-5 * direction
        expected = (parameter.grad * direction).sum().item()
        assert (slopes[0] - slopes[1]) / 2e-5 == pytest.approx(expected, rel=1e-4, abs=1e-7), name


def test_the_step_on_the_support_and_the_teacher_lower_what_they_descend() -> None:
    _, model, _ = attached()
    nudge(model)
    tuner, task = model.base_model, episode("vit", ways=3, shots=4, queries=4)
    theta = {n: t.detach().requires_grad_() for n, t in tuner.task_weights(*_support(task), 3).items()}
    (inputs, classes), (asked, truth) = task.part(False), task.part(True)

    def loss(weights, heads, rows, targets) -> float:
        found = episodes.scores(tuner.features(rows, weights), heads)
        return torch.nn.functional.cross_entropy(found, targets).item()

    means = episodes.prototypes(tuner.features(inputs, theta), classes, 3)
    moved, heads = training.after_support(tuner.features, theta, inputs, classes, 3, 1e-2)
    assert loss(moved, heads, inputs, classes) < loss(theta, means, inputs, classes)
    same, untouched = training.after_support(tuner.features, theta, inputs, classes, 3, 0.0)
    assert same is theta
    assert torch.equal(untouched, means)
    student = loss(theta, means, asked, truth)
    losses = []
    for steps in (1, 3):
        query = tuner.features(asked, theta)
        taught = training.dense_teacher(tuner.features, query, theta, means, asked, truth, steps, 1e-2)
        assert not taught.requires_grad
        assert all(tensor.grad is None for tensor in theta.values())
        query.sum().backward()  # what the student learns by is still there
        for tensor in theta.values():
            tensor.grad = None
        losses.append(torch.nn.functional.cross_entropy(taught, truth).item())
    assert losses[1] < losses[0] < student


def test_each_teacher_can_be_left_out() -> None:
    task, found = episode("vit"), []
    for more in ({"distillation": 0.0}, {"teacher_steps": 0}, {}, {"base_teacher": True}, {"divergence": "forward"}):
        _, model, _ = attached(inner_lr=0.0, **more)
        nudge(model)
        found.append(float(episodes.loss(model, task).detach()))
    assert found[0] == pytest.approx(found[1])
    assert len({round(value, 9) for value in found[1:]}) == 4


def test_a_single_expert_needs_no_router() -> None:
    _, model, method = attached(experts=1)
    assert not any("router" in name for name in trained(model))
    nudge(model)
    task = episode("vit")
    episodes.logits(model, task)
    assert model.experts.tolist() == [1.0]
    train(model, method, "vit")


def test_unstructured_masks_have_an_entry_for_each_weight() -> None:
    _, model, method = attached(structure="unstructured", targets=["mlp"], sparsity=0.7)
    tuner = model.base_model
    names = tuner.state.layouts["default"].shapes
    assert all("mlp" in name for name in names)
    assert tuner.state.layouts["default"].entries == sum(w.numel() for w in tuner.weights().values())
    train(model, method, "vit")
    method.finish(model)
    assert (maths.sparsity(tuner.masks(), tuner.counts()) >= 0.7).all()


def test_structured_experts_take_few_bytes() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    from peftcli.models import families

    shape = ViTConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6, id2label={})
    with torch.device("meta"):
        base = ViTForImageClassification(shape).requires_grad_(False)
        own = _bytes(base.parameters())
        model = Method(Settings(experts=8)).attach(base, families.find("vit"))
    kept = {name: tensor for name, tensor in model.state_dict().items() if "smat_" in name}
    assert _bytes(tensor for name, tensor in kept.items() if "smat_delta" in name) <= own
    assert _bytes(tensor for name, tensor in kept.items() if "smat_delta" not in name) <= 0.15 * own


def test_masks_are_the_same_in_training_and_after_it(kind) -> None:
    _, model, method = attached(kind)
    train(model, method, kind)
    tuner = model.base_model
    after = tuner.eval().masks()
    assert torch.equal(tuner.train().masks(), after)
    assert ((after == 0) == (tuner.state.smat_logits["default"] <= maths.SHIFT)).all()


@pytest.mark.parametrize("how", ["full", "lora"])
def test_a_merged_model_is_tuned_further_as_any_other(how) -> None:
    _, model, _ = attached()
    nudge(model, size=0.2)
    base, task = headless("vit"), episode("vit", shots=4)
    direct = episodes.logits(model, task).detach()
    tuned = model.merge_for(*_support(task), task.ways)
    tuned.requires_grad_(how == "full")
    if how == "lora":
        tuned = LoraMethod(LoraSettings(r=2, targets=["all"])).attach(tuned, base.family)
    tuned.eval()
    torch.testing.assert_close(episodes.logits(tuned, task), direct, rtol=0, atol=1e-9)
    both = replace(task, inputs={n: torch.cat([v[:12], v[:12]]) for n, v in task.inputs.items()}, support=12,
                   classes_N=task.classes_N[:12].repeat(2))  # fmt: skip
    descent = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], 1e-3)
    losses = []
    for _ in range(6):
        loss = episodes.loss(tuned, both)
        loss.backward()
        descent.step()
        descent.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(episodes.logits(tuned, task), direct)


def test_it_settles_at_its_sparsity_and_fixes_the_masks() -> None:
    _, model, method = attached(sparsity=0.8, settle=0.5)
    train(model, method, "vit", steps=2)
    last = method.stages(STEPS)[-1]
    assert (last.name, last.steps) == ("settled", 2)
    last.start(model)
    tuner = model.base_model
    sparse = maths.sparsity(tuner.masks(), tuner.counts())
    assert (sparse >= 0.8).all()
    before = tuner.masks().clone()
    train(model, method, "vit", steps=2, first=3)
    assert torch.equal(tuner.masks(), before)
    method.finish(model)
    assert torch.equal(maths.sparsity(tuner.masks(), tuner.counts()), sparse)
    logged = method.log(model)
    assert logged["sparsity_union"] <= logged["sparsity_least"] <= logged["sparsity_mean"]
    assert any("were short of their sparsity" in note for note in method.notes)


def test_it_trains_in_float32_on_a_base_in_half_precision(kind) -> None:
    base, model, _ = attached(kind, torch.bfloat16)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    task = episode(kind, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        episodes.loss(model, task).backward()
        with torch.no_grad(), model.disable_adapter():
            assert torch.equal(episodes.logits(model, task), episodes.logits(base.model, task))
        merged = model.merge_for(*_support(task), task.ways)
    assert {p.dtype for p in merged.parameters()} == {p.dtype for p in base.model.parameters()}


def test_without_a_task_it_says_what_it_needs() -> None:
    base, model, _ = attached()
    with pytest.raises(UserError, match=r"only for a task.*[\s\S]*for_support"):
        model(**base.batch)
    with pytest.raises(ValueError, match="--support FOLDER"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="one adapter"):
        model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))


def test_temperature_and_place_come_back() -> None:
    _, model, method = attached()
    train(model, method, "vit", steps=2)
    kept, temperature = method.state(model), model.base_model.settings.router_temperature
    assert temperature == pytest.approx(5 - 3.125 * 2 / STEPS)
    _, other, again = attached()
    again.restore(other, kept)
    assert other.base_model.settings.router_temperature == temperature
    assert again.log(other).keys() - {"query_loss"} == method.log(model).keys() - {"query_loss"}


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _support(task: Any) -> tuple[Any, torch.Tensor]:
    return task.part(query=False)
