"""A task's own model fine-tuned on its support: what no step changes, what steps do, and what is never looked at."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from peftcli.methods import episodes
from peftcli.tasks.episodes.support import Support
from peftcli.testing.rows import nudge
from peftcli.training import few_shot as tuning
from tests.few_shot import episode, headless
from tests.methods.test_smat import attached


def support_of(task) -> Support:
    inputs, classes = task.part(query=False)
    return Support(inputs, classes, [str(i) for i in range(task.ways)])


@pytest.mark.parametrize("kind", ["vit", "resnet", "llama"])
def test_no_rate_and_no_steps_are_the_tasks_model_itself(kind) -> None:
    _, model, _ = attached(kind, torch.float32)
    nudge(model, size=0.2)
    model.requires_grad_(False)
    task = episode(kind, dtype=torch.float32)
    expected = episodes.logits(model, task)
    for then in (tuning.Then("lora", lr=0.0, steps=2), tuning.Then("full", lr=0.0, steps=2)):
        found = tuning._Tuning(then)(model, task)
        torch.testing.assert_close(episodes.logits(found, task), expected, rtol=0, atol=1e-4)
    assert torch.equal(episodes.logits(model, task), expected)


@pytest.mark.parametrize("method", ["lora", "full", "rowcol", "kpsvd"])
def test_steps_lower_the_supports_loss_and_never_see_the_query(method, monkeypatch) -> None:
    monkeypatch.setattr(tuning, "CHANGED", 0.0)
    _, model, _ = attached("vit", torch.float32)
    nudge(model, size=0.2)
    task = episode("vit", shots=4, dtype=torch.float32)
    then = tuning.Then(method, lr=1e-3, steps=8)
    tuned = tuning._Tuning(then)(model, task)

    def loss(model, weights=None) -> float:
        inputs, classes = task.part(query=False)
        with torch.no_grad(), episodes.adapted(model, inputs, classes, task.ways):
            features = model(**inputs).logits
        return float(F.cross_entropy(episodes.scores(features, episodes.prototypes(features, classes, 3)), classes))

    assert loss(tuned) < loss(model)
    asked = {name: value.clone() for name, value in task.inputs.items()}
    asked["pixel_values"][task.support :] = 7.0
    other = replace(task, inputs=asked, classes_N=torch.cat([task.classes_N[:12], 2 - task.classes_N[12:]]))
    again = tuning._Tuning(then)(model, other)
    for name, value in tuned.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_pictures_are_changed_and_stay_what_they_are() -> None:
    torch.manual_seed(0)
    pixels = torch.randn(5, 3, 16, 16)
    changed = [tuning._changed(pixels) for _ in range(40)]
    assert all(one.shape == pixels.shape and one.isfinite().all() for one in changed)
    same = sum(torch.equal(one, pixels) for one in changed)
    assert 0 < same < 12


def test_a_base_without_a_head_can_be_tuned_as_it_is() -> None:
    base = headless("vit", torch.float32)
    task = episode("vit", dtype=torch.float32)
    before = copy.deepcopy(base.model.state_dict())
    found = tuning.finetuned(base.model, support_of(task), tuning.Then("full", lr=1e-3, steps=2))
    assert any(not torch.equal(value, before[name]) for name, value in found.state_dict().items())
