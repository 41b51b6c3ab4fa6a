"""The two bars: every weight, and the head alone."""

from __future__ import annotations

import pytest
import torch

from peftcli.config.errors import UserError
from peftcli.methods import registry
from peftcli.testing.rows import Row, trained
from peftcli.testing.tiny import llama

HEAD = "sequence-classification"


def test_full_trains_everything_in_float32() -> None:
    untouched, model, _ = Row("full").attached(torch.bfloat16)
    assert trained(model).keys() == dict(untouched.model.named_parameters()).keys()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_head_first_has_two_stages_and_each_can_start_alone() -> None:
    _, model, method = Row("full", {"head_first": 0.25}, architecture=HEAD).attached()
    first, second = method.stages(40)
    assert [(stage.name, stage.steps) for stage in (first, second)] == [("head", 10), ("all", 30)]
    first.start(model)
    assert list(trained(model)) == ["score.weight"]
    second.start(model)
    assert len(trained(model)) == len(list(model.parameters()))
    _, fresh, _ = Row("full", {"head_first": 0.25}, architecture=HEAD).attached()
    second.start(fresh)
    assert trained(fresh).keys() == trained(model).keys()


def test_a_share_that_rounds_to_no_step_is_one_stage() -> None:
    assert len(Row("full", {"head_first": 0.01}).new_method().stages(10)) == 1


def test_a_head_that_is_the_embedding_cannot_go_first() -> None:
    base = llama(torch.float32)
    base.model.lm_head.weight = base.model.model.embed_tokens.weight
    with pytest.raises(UserError, match="its embedding"):
        Row("full", {"head_first": 0.5}).new_method().attach(base.model, base.family)
    with pytest.raises(UserError, match=r"head_first=1\.5"):
        Row("full", {"head_first": 1.5}).new_method()


def test_the_probe_trains_the_head_alone_and_needs_one() -> None:
    _, model, _ = Row("linear_probe", architecture=HEAD).attached()
    assert list(trained(model)) == ["base_model.model.score.modules_to_save.default.weight"]
    base = llama()
    with pytest.raises(UserError, match=r"task\.head=linear"):
        Row("linear_probe").new_method().attach(base.model, base.family)


def test_unknown_method() -> None:
    with pytest.raises(UserError, match="did you mean: lora"):
        registry.find("loraa")
