"""Selected positions give the loss and the gradients of full logits, exactly, on every kind of wrapped model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from peftcli.models.positions import select
from peftcli.testing.rows import Row, nudge, trained

ROWS = (
    Row("full", dtype=torch.float32),
    Row("lora", {"targets": ["attention", "head"]}, "head"),
    Row("peft", {"type": "PROMPT_TUNING", "args": {"num_virtual_tokens": 3}}, "prompt"),
    Row("peft", {"type": "P_TUNING", "args": {"num_virtual_tokens": 3, "encoder_hidden_size": 8}}, "p"),
    Row("peft", {"type": "PREFIX_TUNING", "args": {"num_virtual_tokens": 3}}, "prefix"),
    Row("peft", {"type": "ADAPTION_PROMPT", "args": {"adapter_len": 2, "adapter_layers": 1}}, "adaption"),
)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_loss_and_gradients_equal_those_of_full_logits(row: Row) -> None:
    base, model, _ = row.attached()
    model.double()
    nudge(model)
    wanted_BL = base.targets != -100
    wanted_BL[:, :3] = False
    expected = nn.functional.cross_entropy(base.outputs(model)[wanted_BL], base.targets[wanted_BL], reduction="sum")
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in trained(model).items()}
    model.zero_grad()

    with select(model, wanted_BL):
        logits_SV = model(**base.batch).logits
    assert logits_SV.shape == (int(wanted_BL.sum()), 64)
    loss = nn.functional.cross_entropy(logits_SV, base.targets[wanted_BL], reduction="sum")
    loss.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for name, parameter in trained(model).items():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-10, atol=1e-12, msg=name)


def test_the_head_sees_the_selected_positions_only() -> None:
    base, model, _ = ROWS[1].attached()
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, out: rows.append(out.shape))
    mask_BL = torch.zeros(base.targets.shape, dtype=torch.long)
    mask_BL[0, 2] = mask_BL[1, 0] = mask_BL[1, 4] = 1
    with select(model, mask_BL):
        model(**base.batch)
    model(**base.batch)
    assert rows == [(3, 64), (2, 7, 64)]


def test_a_model_wrapped_for_several_processes(tmp_path: Path) -> None:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.nn.parallel import DistributedDataParallel

    base, model, _ = ROWS[1].attached()
    init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with select(wrapped := DistributedDataParallel(model), base.targets != -100):
            assert wrapped(**base.batch).logits.shape == (int((base.targets != -100).sum()), 64)
    finally:
        destroy_process_group()


def test_full_logits_are_back_after_an_error() -> None:
    base, model, _ = ROWS[1].attached()
    with pytest.raises(ZeroDivisionError), select(model, base.targets != -100):
        raise ZeroDivisionError
    assert base.outputs(model).shape == (2, 7, 64)
