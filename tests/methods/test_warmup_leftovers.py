"""What SDT's warm-up must not leave behind where more than the blocks is trained, and how a selection comes back."""

from __future__ import annotations

import torch
from torch import nn
from transformers import MambaConfig

from peftcli.methods.sdt.settings import Settings
from peftcli.methods.sdt.tuner import ADAPTER, Method, layers
from peftcli.models import mamba_gaps
from peftcli.models.mamba import FAMILY


def classifier(layer_count: int = 2) -> nn.Module:
    torch.manual_seed(0)
    shape = MambaConfig(
        hidden_size=16, num_hidden_layers=layer_count, state_size=4, vocab_size=30, num_labels=3, pad_token_id=0
    )
    return mamba_gaps.MambaForSequenceClassification(shape).requires_grad_(False)


def test_a_classification_head_starts_anew_after_the_warm_up() -> None:
    method = Method(Settings(selector="magnitude", channels=4, states=2, warmup=3))
    model = method.attach(classifier(), FAMILY)
    head = model.get_base_model().score.modules_to_save[ADAPTER].weight
    before = head.detach().clone()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.arange(1, 25).view(4, 6)
    for step in (1, 2, 3):
        nn.functional.cross_entropy(model(input_ids=tokens).logits, torch.tensor([0, 1, 2, 0])).backward()
        optimiser.step()
        method.after_step(model, step)
    assert not torch.equal(head, before)
    method.stages(9)[1].start(model)
    after = model.get_base_model().score.modules_to_save[ADAPTER].weight
    assert after is head
    assert after.requires_grad
    assert torch.equal(after, before)


def test_scores_come_back_in_the_order_of_the_layers() -> None:
    method = Method(Settings(selector="random", channels=4, states=2))
    model = method.attach(classifier(11), FAMILY)
    state = method.state(model)
    assert sum(name.endswith(".score") for name in state) == 11
    method.restore(model, dict(sorted(state.items(), reverse=True)))
    assert list(method._scores) == [name for name, _ in layers(model)]
