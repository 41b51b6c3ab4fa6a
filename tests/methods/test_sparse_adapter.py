"""Sparse adapters on models: stages, budgets, masks, the guard, compaction, files, places, what is kept for backward.

Letters: as in peftcli/methods/sparse_adapter/layer.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from peftcli.config.errors import UserError
from peftcli.config.schema import OptimConfig
from peftcli.methods.contract import Calibration, Method
from peftcli.methods.sparse_adapter import compaction, maths, survival
from peftcli.methods.sparse_adapter.guard import Guard, chance
from peftcli.methods.sparse_adapter.tuner import ADAPTER
from peftcli.testing import tiny
from peftcli.testing.rows import Row, nudge, trained
from peftcli.testing.tiny import Base
from peftcli.training import optimiser as optimisers

HEAD = "sequence-classification"
PLAIN = {"r": 8, "dropout": 0.0, "guard": None}
Look = Callable[[str, int, Any, torch.optim.Optimizer], None]


def attach(
    base: Callable[..., Base] = tiny.llama, architecture: str = HEAD, **settings: Any
) -> tuple[Base, Any, Method]:
    """A model in float32 with modules in it, before any stage."""
    row = Row("sparse_adapter", {**PLAIN, **settings}, base=base, architecture=architecture, dtype=torch.float32)
    made, method = row.new_base(), row.new_method()
    torch.manual_seed(0)
    model = method.attach(made.model, made.family, Calibration([[made.batch]], lambda m, _: made.loss(m), 1, 20))
    return made, model, method


def stages(
    base: Base,
    model: Any,
    method: Method,
    steps: int = 20,
    look: Look | None = None,
    until: str = "final",
    **optim: Any,
) -> None:
    """As the loop does it: every stage with an optimiser of its own; `look` is called after each step."""
    config = OptimConfig(**{"lr": 1e-2, "weight_decay": 0.1, **optim})
    model.train()
    for stage in method.stages(steps):
        assert stage.start is not None
        stage.start(model)
        optimiser = optimisers.build(config, model, method.parameter_groups(model))
        method.take_optimiser(model, optimiser)
        for step in range(stage.steps):
            base.loss(model).backward()
            optimiser.step()
            method.after_step(model, step)
            optimiser.zero_grad()
            if look:
                look(stage.name, step + 1, model, optimiser)
        if stage.name == until:
            break
    model.eval()


def kept(model: Any) -> survival.Count:
    return survival.count(model, ADAPTER)


@pytest.mark.parametrize("gate", [True, False])
def test_parameters_are_counted_by_the_formula(gate: bool) -> None:
    _, model, _ = attach(gate=gate, norm=True, architecture="causal-lm")
    d, r, modules = tiny.WIDTH, 8, 4
    assert sum(p.numel() for p in trained(model).values()) == modules * (2 * d * r + r + d + 2 * d + gate * r)


def test_what_each_stage_trains_is_what_was_said() -> None:
    base, model, method = attach()
    seen: dict[str, set[str]] = {}
    places: dict[str, set[str]] = {}

    def look(stage: str, step: int, model: Any, _: Any) -> None:
        names = set(trained(model))
        assert seen.setdefault(stage, names) == names
        places[stage] = {n.split(".layers.")[1][0] if ".layers." in n else "head" for n in names}

    stages(base, model, method, look=look)
    assert places == {
        "probe": {"head"}, "few": {"head", "1"}, "sparsify": {"head", "0", "1"}, "final": {"head", "0", "1"},
    }  # fmt: skip
    assert [(s.name, s.steps) for s in method.stages(20)] == [("probe", 2), ("few", 4), ("sparsify", 10), ("final", 4)]
    assert [s.name for s in method.stages(20) if s.stops_early] == ["final"]
    causal = attach(architecture="causal-lm")[2]
    assert [s.name for s in causal.stages(20)] == ["few", "sparsify", "final"]


@pytest.mark.parametrize("structure", ["unit", "weight"])
def test_the_budget_is_held_and_pruned_weights_stay_zero(structure: str) -> None:
    base, model, method = attach(structure=structure, sparsity=0.75)
    frozen = base.model.model.embed_tokens.weight.clone()
    counts: list[int] = []

    def look(stage: str, step: int, model: Any, optimiser: torch.optim.Optimizer) -> None:
        if stage not in ("sparsify", "final"):
            return
        counts.append(kept(model).units if structure == "unit" else kept(model).weights)
        for _, layer in compaction.layers(model, ADAPTER):
            tensors = layer.tensors(ADAPTER)
            for kind, mask in layer.masks(ADAPTER).items():
                if kind in tensors:
                    gone = ~mask.expand_as(tensors[kind])
                    for values in (tensors[kind], *optimiser.state[tensors[kind]].values()):
                        assert values.shape != gone.shape or not values[gone].any()
                    assert tensors[kind].grad is None or not tensors[kind].grad[gone].any()

    stages(base, model, method, look=look)
    total = 4 * (8 if structure == "unit" else 2 * 8 * tiny.WIDTH)
    assert counts == sorted(counts, reverse=True)
    assert 0 < counts[-1] <= maths.kept(0.75, total)
    assert counts[7] <= maths.kept(0.75, total)  # at 80 % of the stage, and held
    assert counts[10:] == [counts[10]] * 4  # masks are fixed in the last stage
    assert torch.equal(base.model.model.embed_tokens.weight, frozen)
    method.finish(model)
    zeros = {n: p == 0 for n, p in model.named_parameters() if "sparse_" in n}
    model.half()
    assert all(bool((dict(model.named_parameters())[n][mask] == 0).all()) for n, mask in zeros.items())


def test_without_penalty_and_budget_it_is_plain_training() -> None:
    ends = []
    for plain in (False, True):
        base, model, method = attach(l1=0.0, group=0.0, sparsity=0.0, final=0.0, few=0.0, probe=0.0)
        if plain:
            method.take_optimiser = lambda *_: None  # type: ignore[method-assign]
        stages(base, model, method)
        ends.append({name: p.detach().clone() for name, p in trained(model).items()})
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_penalised_tensors_get_no_weight_decay_and_the_loss_no_penalty() -> None:
    _, model, method = attach(l1=1e-3)
    method.stages(20)[2].start(model)
    assert method.penalty(model) is None
    built = optimisers.build(OptimConfig(weight_decay=0.5), model, method.parameter_groups(model))
    decayed = {id(p) for row in built.param_groups if row["weight_decay"] for p in row["params"]}
    names = {name for name, p in trained(model).items() if id(p) in decayed}
    assert {name.split(".")[-1] if "sparse_" not in name else "sparse" for name in names} == {"weight"}  # the head
    method.stages(20)[3].start(model)
    assert {row["lr_scale"] for row in method.parameter_groups(model)} == {1 / 3}


@pytest.mark.parametrize("structure", ["unit", "weight"])
@pytest.mark.parametrize("base_kind", [tiny.llama, tiny.mamba])
def test_compaction_computes_the_same_with_less(structure: str, base_kind: Any) -> None:
    base, model, method = attach(base_kind, structure=structure, sparsity=0.6, l1=0.0)
    stages(base, model, method, until="sparsify")
    before, masked = base.outputs(model), kept(model)
    method.finish(model)
    after, now = base.outputs(model), kept(model)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    assert now.weights == masked.weights or structure == "weight"  # units that only read, or only write, go
    assert now.units == now.all_units == masked.units
    assert now.all_weights == 2 * tiny.WIDTH * now.units < masked.all_weights
    config = model.peft_config[ADAPTER]
    assert {name: len(units) for name, units in config.units.items()} == {
        name: len(layer.sparse_down[ADAPTER]) for name, layer in compaction.layers(model, ADAPTER)
    }


def test_a_module_without_units_vanishes_and_the_base_stands_in_its_place() -> None:
    base, model, _ = attach()
    nudge(model)
    (name, layer), *others = compaction.layers(model, ADAPTER)
    layer.prune(ADAPTER, {"units": torch.zeros(8, dtype=torch.bool)})
    before = base.outputs(model)
    compaction.compact(model)
    compaction.unwrap(model)
    assert type(model.get_base_model().get_submodule(name)) is nn.Linear
    assert model.peft_config[ADAPTER].target_modules == sorted(other for other, _ in others)
    torch.testing.assert_close(base.outputs(model), before, rtol=0, atol=1e-6)


def test_when_everything_is_pruned_the_run_says_so() -> None:
    base, model, method = attach(group=1e6)
    with pytest.raises(UserError, match="every module has been pruned away"):
        stages(base, model, method)
    with pytest.raises(UserError, match=r"sparsity=0.99 leaves 0 of 32 units"):
        attach(sparsity=0.99)
    with pytest.raises(UserError, match=r"method.floor=5 of each of 4 modules is more"):
        attach(floor=5)


def test_the_floor_keeps_every_module() -> None:
    base, model, method = attach(sparsity=0.85, floor=1, l1=0.0, group=0.0)
    stages(base, model, method)
    assert (kept(model).units, kept(model).modules) == (5, 4)


def test_large_sparse_has_the_same_budget_in_more_units() -> None:
    base, model, method = attach(wide=4, structure="weight", l1=0.0, group=0.0)
    assert {len(layer.units[ADAPTER]) for _, layer in compaction.layers(model, ADAPTER)} == {32}
    stages(base, model, method, until="sparsify")
    assert kept(model).weights == 4 * 2 * 8 * tiny.WIDTH


def test_modules_are_chosen_by_what_the_second_stage_shows() -> None:
    base, model, method = attach(chosen=1, guard=0.1)
    scores: dict[str, float] = {}

    def look(stage: str, step: int, model: Any, _: Any) -> None:
        if stage == "few":
            scores.update({name: float(score) for name, score in method._pruning.modules.items()})

    stages(base, model, method, look=look)
    assert len(scores) == 4
    [(name, _)] = compaction.layers(model, ADAPTER)
    assert name == max(scores, key=scores.__getitem__)
    assert any("kept the 1 of 4 modules" in note for note in method.notes)


def test_pruning_that_hurts_is_taken_back() -> None:
    base, model, method = attach(sparsity=0.9, guard=0.1, r=10, l1=0.0, group=0.0)
    at: dict[int, dict[str, torch.Tensor]] = {}

    def look(stage: str, step: int, model: Any, _: Any) -> None:
        if stage == "few" and step == 4:
            method.measured(model, 0.9, True)
        if stage == "sparsify" and step % 2 == 0:
            at[step] = {n: p.detach().clone() for n, p in trained(model).items()}
            method.measured(model, 0.9 if method._now < 0.6 else 0.5, True)
            if step == 4:  # taken back to step 2
                now = {n: p.detach().clone() for n, p in trained(model).items()}
                assert all(torch.equal(now[n], at[2][n]) for n in now)

    stages(base, model, method, look=look)
    level = maths.cubic(2, 8, 0.0, 0.9)
    assert kept(model).units == maths.kept(level, 40)
    assert f"back to {level:.0%}" in method.notes[0]
    held = attach(guard=None)[2]
    held.stages(20)[2].start(model)
    held.measured(model, -99.0, True)
    assert not held.notes


def test_what_few_rows_may_show_by_accident_is_no_loss() -> None:
    guard = Guard(0.05, ADAPTER)
    guard.reference = 0.9
    assert guard.loses(0.84) == pytest.approx(0.06)
    assert guard.loses(0.84, 1000) == pytest.approx(0.06)
    assert guard.loses(0.84, 40) is None
    assert guard.loses(0.75, 40) == pytest.approx(0.15)
    assert chance(0.9, 40) == pytest.approx(0.101, abs=1e-3)
    assert chance(1.0, 8) > 0.1
    guard.reference = -0.7  # a loss
    assert guard.loses(-0.8, 40) == pytest.approx(0.1)


@pytest.mark.parametrize("structure", ["unit", "weight"])
def test_the_file_is_small_and_comes_back_bit_for_bit(structure: str, tmp_path: Path) -> None:
    base, model, method = attach(structure=structure, sparsity=0.9, r=32, architecture="causal-lm")
    stages(base, model, method)
    method.finish(model)
    model.save_pretrained(tmp_path)
    weights = kept(model).weights
    stored = load_file(tmp_path / "adapter_model.safetensors")
    matrices = [key for key in stored if "sparse_down" in key or "sparse_up." in key]
    held = sum(stored[key].numel() * stored[key].element_size() for key in matrices if "bias" not in key)
    dense = 4 * kept(model).all_weights
    assert held <= min(dense, 5 * weights + 32)
    if structure == "weight":
        assert any(key.endswith((".bits", ".gaps")) for key in matrices)
    fresh = Row("sparse_adapter", base=tiny.llama, dtype=torch.float32).new_base()
    loaded = PeftModel.from_pretrained(fresh.model, tmp_path)
    before = {n: p for n, p in model.named_parameters() if "sparse_" in n}
    after = {n: p for n, p in loaded.named_parameters() if "sparse_" in n}
    assert before.keys() == after.keys()
    assert all(torch.equal(p, after[n]) for n, p in before.items())
    assert torch.equal(base.outputs(loaded.eval()), base.outputs(model))


def test_a_nonlinear_module_says_why_it_does_not_merge() -> None:
    _, model, _ = attach()
    nudge(model)
    with pytest.raises(NotImplementedError, match="nonlinear"):
        model.merge_and_unload()
    base, model, method = attach(activation="linear", sparsity=0.5)
    stages(base, model, method)
    method.finish(model)
    before = base.outputs(model)
    torch.testing.assert_close(base.outputs(model.merge_and_unload(safe_merge=True)), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_late_modules_keep_nothing_of_what_is_before_them(checkpointing: bool) -> None:
    base, model, _ = attach(last_blocks=1)
    if checkpointing:  # as `training.prepare` does it
        base.model.activation_checkpointing_enable({"use_reentrant": False})
        base.model.disable_input_require_grads()
    graphs: dict[str, bool] = {}
    for name, block in base.model.model.layers.named_children():
        block.register_forward_hook(lambda _, __, out, name=name: graphs.update({name: out.requires_grad}))
    model.train()
    base.loss(model).backward()
    assert graphs == {"0": False, "1": True}
    assert all(p.grad is not None for n, p in trained(model).items() if "sparse_up" in n)


def test_places_that_overlap_or_are_none_are_refused() -> None:
    with pytest.raises(UserError, match="within it"):
        attach(targets=["block", "mlp"])
    with pytest.raises(UserError, match="can be put at"):
        attach(targets=["embed"])
    assert [name for name, _ in compaction.layers(attach(targets=["mlp"], last_blocks=1)[1], ADAPTER)] == [
        "model.layers.1.mlp.down_proj"
    ]


@pytest.mark.parametrize("target", ["resnet.encoder.stages.1", "resnet.embedder"])
def test_beside_a_part_of_another_size_nothing_can_stand(target: str) -> None:
    found = {"targets": [target], "architecture": "image-classification"}
    with pytest.raises(UserError, match="no module can stand beside"):
        attach(tiny.resnet, placement="parallel", **found)
    base, model, _ = attach(tiny.resnet, **found)
    base.loss(model).backward()


def test_a_module_with_a_bias_alone_goes_on_being_trained() -> None:
    base, model, _ = attach(dropout=0.5)
    nudge(model)
    _, layer = next(iter(compaction.layers(model, ADAPTER)))
    with torch.no_grad():
        layer.sparse_down[ADAPTER].zero_()  # every unit is a constant
    layer.prune(ADAPTER, {"units": torch.arange(8) < 5})
    before = base.outputs(model.eval())
    compaction.shrink(layer, ADAPTER)
    assert layer.units[ADAPTER] == []
    torch.testing.assert_close(base.outputs(model), before, rtol=0, atol=1e-6)
    base.loss(model.train()).backward()
    assert layer.sparse_up_bias[ADAPTER].grad.any()


def test_a_guard_without_a_measurement_says_that_it_was_none() -> None:
    base, model, method = attach(guard=0.1)
    stages(base, model, method)
    assert "method.guard had nothing to go by" in method.notes[0]


@pytest.mark.parametrize("base_kind", [tiny.vit, tiny.dinov2, tiny.resnet])
@pytest.mark.parametrize("placement", ["sequential", "parallel"])
def test_on_pictures_it_starts_as_the_base_and_leaves_it_as_it_was(base_kind: Any, placement: str) -> None:
    base, model, method = attach(base_kind, "image-classification", placement=placement, last_blocks=2)
    untouched = base_kind(torch.float32)
    assert torch.equal(base.outputs(model.eval()), untouched.outputs(untouched.model))
    stages(base, model, method)
    method.finish(model)
    assert method.notes[-1].startswith(f"{kept(model).units} of")
    for name, tensor in untouched.model.state_dict().items():
        if "classifier" not in name:
            assert torch.equal(model.unload().state_dict()[name], tensor)
            break
    state = copy.deepcopy(model.unload()).state_dict()
    assert all(torch.equal(state[n], t) for n, t in untouched.model.state_dict().items() if "classifier" not in n)


def test_on_the_meta_device_the_file_has_the_budgets_size() -> None:
    row = Row("sparse_adapter", {**PLAIN, "sparsity": 0.75}, dtype=torch.float32)
    base, method = row.new_base(), row.new_method()
    model = method.attach(base.model.to("meta"), base.family)
    for stage in method.stages(20):
        assert stage.start is not None
        stage.start(model)
    method.finish(model)
    assert {tuple(layer.sparse_down[ADAPTER].shape) for _, layer in compaction.layers(model, ADAPTER)} == {
        (2, tiny.WIDTH)
    }
