"""Every tuner of PEFT by name: what is refused and why, own targets, and the calls that PEFT leaves to the loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from peftcli.config.errors import UserError
from peftcli.methods.peft import kinds
from peftcli.methods.peft.settings import Settings
from peftcli.methods.peft.tuner import Method
from peftcli.testing.rows import Row, nudge, train, trained
from peftcli.testing.tiny import llama

ARGS: dict[str, dict[str, Any]] = {
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "CARTRIDGE": {"num_virtual_tokens": 3},
    "FOURIERFT": {"n_frequency": 20},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PSOFT": {"r": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 16},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": llama().batch["input_ids"][0, :2].tolist()},
    "VBLORA": {"num_vectors": 8, "vector_length": 4},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 20},
}
# The tiny base's values are half as wide as its queries, which these tuners' shared matrices do not take.
TARGETS = {kind: ["attention.q"] for kind in ("VERA", "PVERA", "RANDLORA")}
TYPES = sorted({str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING if hasattr(kind, "_value_")} - set(kinds.UNFIT))


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_trains(kind: str) -> None:
    settings = {"type": kind.lower(), "targets": TARGETS.get(kind, []), "args": ARGS.get(kind, {})}
    base, model, method = Row("peft", settings, kind, dtype=torch.float32).attached()
    assert method.type == kind
    nudge(model)
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    assert before
    train(model, method, base)
    moved = [name for name, p in trained(model).items() if not torch.equal(p, before[name])]
    assert moved == list(before)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Settings(type="LOKRR"), "did you mean: LOKR"),
        (Settings(type="LOKR", args={"aplha": 3}), "did you mean: alpha"),
        (Settings(type="LOKR", args={"target_modules": ["q_proj"]}), "use method.targets"),
        (Settings(type="PREFIX_TUNING", targets=["mlp"]), "takes no targets"),
        (Settings(type="XLORA"), "already trained"),
        (Settings(type="POLY"), "task number"),
        (Settings(type="LORA", args={"init_lora_weights": "eva"}), "init_lora_weights=eva"),
        (Settings(type="ADAMSS", args={"use_asa": True}), "use_asa"),
        (Settings(type="cartridge"), "PEFT's CARTRIDGE needs method.args.num_virtual_tokens"),
        (Settings(type="P_TUNING", args={"num_virtual_tokens": None}), "needs method.args.num_virtual_tokens"),
        (Settings(type="TRAINABLE_TOKENS"), "needs method.args.token_indices"),
    ],
)
def test_refused_before_a_model_is_loaded(settings: Settings, said: str) -> None:
    with pytest.raises(UserError) as error:
        Method(settings)
    assert said in str(error.value)


@pytest.mark.parametrize("kind", TYPES)
def test_without_arguments_a_type_trains_or_says_in_pefts_words_what_it_lacks(kind: str) -> None:
    said = ""
    try:
        row = Row("peft", {"type": kind, "targets": TARGETS.get(kind, [])}, dtype=torch.float32)
        base, model, method = row.attached()
        train(model, method, base, steps=1)
    except UserError as error:
        said = str(error)
    assert not said or said.startswith(f"PEFT's {kind}")
    assert not any(raw in said for raw in ("NoneType", "not supported between", "Error:"))


@pytest.mark.parametrize(
    "failure", [RuntimeError("size mismatch"), AssertionError(), IndexError("3"), ZeroDivisionError()]
)
def test_however_pefts_code_fails_it_is_the_users_mistake(monkeypatch, failure: Exception) -> None:
    monkeypatch.setattr("peftcli.methods.injection.get_peft_model", lambda *_: (_ for _ in ()).throw(failure))
    with pytest.raises(UserError, match=f"PEFT's LOKR cannot be put into this model: {type(failure).__name__}: "):
        Row("peft", {"type": "LOKR"}).attached()
    monkeypatch.setattr(
        "peftcli.methods.injection.get_peft_model", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory"))
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        Row("peft", {"type": "LOKR"}).attached()


def test_all_mistakes_come_at_once() -> None:
    with pytest.raises(UserError) as error:
        Method(Settings(type="LOKR", args={"rr": 1, "aplha": 2}))
    assert len(error.value.mistakes) == 2


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING", "TRAINABLE_TOKENS", "ADAPTION_PROMPT"])
def test_heads_that_would_not_be_trained_or_would_read_padding(kind: str) -> None:
    base = llama(torch.float32, "sequence-classification")
    with pytest.raises(UserError, match=r"task\.head=label_words"):
        Method(Settings(type=kind, args=ARGS[kind])).attach(base.model, base.family)


def test_prefix_tuning_under_a_head_ignores_padding() -> None:
    row = Row("peft", {"type": "PREFIX_TUNING", "args": ARGS["PREFIX_TUNING"]}, architecture="sequence-classification")
    base, model, _ = row.attached()
    nudge(model)
    short = {name: value[1:, :5] for name, value in base.batch.items()}
    torch.testing.assert_close(model(**short).logits[0], base.outputs(model)[1])


def test_lora_by_this_door_is_put_back_too() -> None:
    row = Row("peft", {"type": "LORA", "args": {"init_lora_weights": "pissa", "r": 4}}, dtype=torch.float32)
    untouched, model, method = row.attached()
    method.finish(model)
    assert model.peft_config["default"].r == 8
    for name, tensor in model.unload().state_dict().items():
        assert torch.equal(tensor, untouched.model.state_dict()[name])


def adalora(**args: Any) -> Row:
    return Row("peft", {"type": "ADALORA", "args": {"init_r": 6, "target_r": 2, **args}}, dtype=torch.float32)


def test_adalora_learns_the_number_of_steps_and_reduces_ranks() -> None:
    base, model, method = adalora().attached()
    (stage,) = method.stages(8)
    stage.start(model)
    train(model, method, base, steps=8)
    assert model.peft_config["default"].total_step == 8
    kept = sum(int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name)
    assert kept == 2 * 4


def test_adaloras_schedule_must_leave_room() -> None:
    with pytest.raises(UserError, match="leave nothing of 10 steps"):
        adalora(tinit=4, tfinal=6).new_method().stages(10)


def test_adaloras_penalty_is_pefts_own() -> None:
    base, model, method = adalora().attached()
    nudge(model)
    labels = base.batch["input_ids"]
    with_penalty = model(**base.batch, labels=labels).loss
    plain = model.get_base_model()(**base.batch, labels=labels).loss
    torch.testing.assert_close(method.penalty(model), with_penalty - plain, rtol=1e-4, atol=1e-4)


def test_adalora_resumes_exactly() -> None:
    def run(steps: range, model: Any, method: Method, base: Any) -> None:
        for step in steps:
            base.loss(model).backward()
            with torch.no_grad():
                for parameter in trained(model).values():
                    parameter -= 0.1 * parameter.grad
            method.after_step(model, step)
            model.zero_grad()

    row = adalora(tinit=1, tfinal=1, deltaT=2)
    base, whole, method = row.attached()
    method.stages(9)[0].start(whole)
    run(range(1, 6), whole, method, base)
    state = {name: tensor.clone() for name, tensor in method.state(whole).items()}
    tensors = {name: p.detach().clone() for name, p in trained(whole).items()}
    run(range(6, 10), whole, method, base)

    _, again, method = row.attached()
    method.stages(9)[0].start(again)
    with torch.no_grad():
        for name, parameter in trained(again).items():
            parameter.copy_(tensors[name])
    method.restore(again, state)
    run(range(6, 10), again, method, base)
    assert all(torch.equal(p, trained(again)[name]) for name, p in trained(whole).items())
    assert whole.peft_config["default"].rank_pattern == again.peft_config["default"].rank_pattern


def test_adaloras_rank_counts_are_no_weights() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        _, model, _ = adalora().attached(dtype)
        assert not any("ranknum" in name for name in trained(model))
