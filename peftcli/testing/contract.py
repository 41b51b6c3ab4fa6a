"""What every method has to do, as tests. Subclass `MethodContract` and give it `rows`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel

from peftcli.models import batch_norm
from peftcli.testing.rows import Row, nudge, train, trained
from peftcli.testing.tiny import Base

MERGE_BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Largest difference between merged and unmerged outputs, as a share of the outputs' spread."""
CLOSE = {torch.float64: 1e-10, torch.float32: 1e-4}


def when(condition: Callable[[Row], bool]) -> Callable:
    """Run a test for the rows of which this is true."""

    def mark(test: Callable) -> Callable:
        test.applies = condition  # type: ignore[attr-defined]
        return test

    return mark


def promises(capability: str) -> Callable:
    """Run a test for the adapters that declare this capability."""
    return when(lambda row: _adapter(row) and getattr(row.new_method().capabilities, capability))


def _adapter(row: Row) -> bool:
    return row.new_method().saves == "adapter"


class MethodContract:
    """The matrix. Each test takes one row."""

    rows: ClassVar[Sequence[Row]] = ()

    def test_stages_add_up(self, row: Row) -> None:
        assert sum(stage.steps for stage in row.new_method().stages(17)) == 17

    def test_every_trained_tensor_is_in_one_group(self, row: Row) -> None:
        _, model, method = row.attached()
        named = [name for group in method.parameter_groups(model) for name in group["names"]]
        assert sorted(named) == sorted(trained(model))
        assert named

    def test_trains_in_float32_on_a_bfloat16_base(self, row: Row) -> None:
        base, model, _ = row.attached(torch.bfloat16)
        assert {p.dtype for p in trained(model).values()} == {torch.float32}
        with torch.autocast("cpu", torch.bfloat16):
            base.loss(model).backward()

    def test_only_trained_tensors_move(self, row: Row) -> None:
        base, model, method = row.attached()
        nudge(model)
        before = copy.deepcopy(model.state_dict())
        names = trained(model).keys() | batch_norm.statistics(model)
        train(model, method, base)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]) != (name in names), name

    def test_every_trained_tensor_gets_a_gradient(self, row: Row) -> None:
        base, model, _ = row.attached()
        nudge(model)
        base.loss(model).backward()
        dead = [name for name, p in trained(model).items() if p.grad is None or not p.grad.any()]
        assert not dead

    @when(lambda row: row.exact_gradients and row.dtype == torch.float64)
    def test_gradients_match_finite_differences(self, row: Row) -> None:
        base, model, _ = row.attached()
        model.double()
        nudge(model)
        base.loss(model).backward()
        generator = torch.Generator().manual_seed(2)
        for name, parameter in trained(model).items():
            direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            slope = _slope(base, model, parameter, direction)
            assert slope == pytest.approx((parameter.grad * direction).sum().item(), rel=1e-5, abs=1e-8), name

    @when(lambda row: row.recomputes and row.new_method().capabilities.recomputes)
    def test_gradient_checkpointing_changes_nothing(self, row: Row) -> None:
        gradients = []
        for checkpointing in (False, True):
            base, model, _ = row.attached()
            nudge(model)
            if checkpointing:
                _recompute(model)
            model.train()
            base.loss(model).backward()
            gradients.append({name: p.grad for name, p in trained(model).items()})
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, rtol=CLOSE[row.dtype], atol=CLOSE[row.dtype])

    @when(lambda row: row.architecture == "causal-lm")
    def test_generates_what_it_scores_highest(self, row: Row) -> None:
        base, model, _ = row.attached()
        nudge(model)
        prompt_BL = base.batch["input_ids"][:1]
        said_BL = model.generate(
            input_ids=prompt_BL, attention_mask=torch.ones_like(prompt_BL), max_new_tokens=1, do_sample=False
        )
        scores_BLV = model(input_ids=prompt_BL, attention_mask=torch.ones_like(prompt_BL)).logits
        assert said_BL[0, -1] == scores_BLV[0, -1].argmax()

    @when(lambda row: row.new_method().capabilities.identity_at_start)
    def test_starts_as_the_base(self, row: Row) -> None:
        untouched, model, _ = row.attached()
        assert _gap(untouched.outputs(model), untouched.outputs(untouched.model)) < CLOSE[row.dtype]

    @when(_adapter)
    def test_file_loads_on_the_untouched_base(self, row: Row, tmp_path: Path) -> None:
        base, model, method = row.attached()
        train(model, method, base)
        method.finish(model)
        model.save_pretrained(tmp_path)
        fresh = row.new_base()
        _redraw_head(fresh)
        loaded = PeftModel.from_pretrained(fresh.model, tmp_path).eval()
        assert _gap(base.outputs(loaded), base.outputs(model)) < CLOSE[row.dtype]
        assert _gap(base.outputs(model), base.outputs(base.model)) > CLOSE[row.dtype]

    @when(lambda row: not _adapter(row))
    def test_saved_model_loads(self, row: Row, tmp_path: Path) -> None:
        base, model, method = row.attached()
        train(model, method, base)
        method.finish(model)
        model.save_pretrained(tmp_path)
        fresh = row.new_base(torch.float32).model.requires_grad_(True)  # so that convolutions take the same kernel
        fresh.load_state_dict(type(fresh).from_pretrained(tmp_path).state_dict())
        assert torch.equal(base.outputs(fresh), base.outputs(model))

    @when(_adapter)
    def test_disabled_is_the_base(self, row: Row) -> None:
        untouched, model, method = row.attached()
        nudge(model)
        method.finish(model)
        adapted = untouched.outputs(model)
        with model.disable_adapter():
            assert torch.equal(untouched.outputs(model), untouched.outputs(untouched.model))
        assert torch.equal(untouched.outputs(model), adapted)

    @promises("merges")
    @pytest.mark.parametrize("dtype", MERGE_BOUNDS, ids=str)
    def test_merged_equals_unmerged(self, row: Row, dtype: torch.dtype) -> None:
        if dtype == torch.float64 and row.dtype != torch.float64:
            pytest.skip("refuses float64")
        base, model, method = row.attached(dtype)
        nudge(model)
        method.finish(model)
        unmerged = base.outputs(model)
        merged = model.merge_and_unload(safe_merge=True)
        assert type(merged) is type(base.model)
        assert _gap(base.outputs(merged), unmerged) < MERGE_BOUNDS[dtype]

    @promises("merges")
    def test_unmerging_undoes_merging(self, row: Row) -> None:
        base, model, method = row.attached()
        nudge(model)
        method.finish(model)
        before = base.outputs(model)
        model.merge_adapter()
        model.unmerge_adapter()
        # IA3 divides by what it multiplied with, plus a small number.
        assert _gap(base.outputs(model), before) < max(CLOSE[row.dtype], 1e-6)

    @promises("unloads")
    def test_unloading_gives_the_base_back_bit_for_bit(self, row: Row) -> None:
        untouched, model, method = row.attached()
        train(model, method, untouched)
        method.finish(model)
        saved_whole = tuple(getattr(model.peft_config["default"], "modules_to_save", None) or ())
        unloaded = model.unload().state_dict()
        expected = untouched.model.state_dict()
        assert unloaded.keys() == expected.keys()
        differing = [name for name in expected if not torch.equal(unloaded[name], expected[name])]
        assert all(name.startswith(saved_whole) for name in differing), differing

    @promises("several_adapters")
    def test_two_adapters_switch(self, row: Row) -> None:
        base, model, method = row.attached()
        nudge(model)
        method.finish(model)
        first, first_names = base.outputs(model), set(trained(model))
        model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
        model.set_adapter("second")
        # PEFT leaves all virtual tokens trainable, whichever adapter is active.
        exclusive = method.capabilities.unloads
        assert first_names.isdisjoint(trained(model)) or not exclusive
        nudge(model, seed=7, but=first_names)
        second = base.outputs(model)
        model.set_adapter("default")
        assert set(trained(model)) == first_names or not exclusive
        assert torch.equal(base.outputs(model), first)
        assert _gap(second, first) > CLOSE[row.dtype]

    def test_does_not_do_what_it_does_not_promise(self, row: Row) -> None:
        base, model, method = row.attached()
        can = method.capabilities
        if not can.identity_at_start:
            assert _gap(base.outputs(model), base.outputs(base.model)) > CLOSE[row.dtype]
        nudge(model)
        outputs = base.outputs(model)
        if not can.merges:
            assert not _works(lambda: copy.deepcopy(model).merge_and_unload(), like=base, as_=outputs)
        if not can.unloads:
            assert not _works(lambda: copy.deepcopy(model).unload(), like=base, as_=base.outputs(base.model))
        if not can.several_adapters:
            with pytest.raises((ValueError, AttributeError)):
                model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
        if not can.recomputes and row.recomputes:
            _recompute(model)
            assert not _works(lambda: model.train(), like=base, as_=outputs)


def _gap(outputs: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the spread of what was expected."""
    return ((outputs.double() - expected.double()).abs().max() / expected.double().std()).item()


def _recompute(model: Any) -> None:
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _works(make: Callable[[], Any], like: Base, as_: torch.Tensor) -> bool:
    try:
        return _gap(like.outputs(make()), as_) < CLOSE[torch.float32]
    except (AttributeError, ValueError, NotImplementedError, RuntimeError):
        return False


def _slope(base: Base, model: Any, parameter: torch.Tensor, direction: torch.Tensor, step: float = 1e-5) -> float:
    """The loss's slope along a direction of one tensor, by a central difference."""
    with torch.no_grad():
        parameter += step * direction
        above = base.loss(model)
        parameter -= 2 * step * direction
        below = base.loss(model)
        parameter += step * direction
    return ((above - below) / (2 * step)).item()


@torch.no_grad()
def _redraw_head(base: Base) -> None:
    """A stranger's base has another random head than the one that training started from."""
    head = getattr(base.model, "score", None) or getattr(base.model, "classifier", None)
    for linear in head.modules() if head is not None else ():
        if isinstance(linear, torch.nn.Linear):
            linear.weight.normal_(generator=torch.Generator().manual_seed(9))
