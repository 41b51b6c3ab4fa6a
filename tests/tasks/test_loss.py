"""The loss and its gradient are those of the plain computation, and prompt positions never reach the vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from peftcli.config.schema import ClassificationConfig, GenerationConfig
from peftcli.data.collate import pad
from peftcli.tasks import loss, registry


@pytest.mark.parametrize(("positions", "words"), [(0, 5), (1, 7), (37, 300)])
def test_equals_torch(positions, words, monkeypatch):
    monkeypatch.setitem(loss.CHUNK, "cpu", 1000)  # several chunks, the last one not full
    ours = torch.randn(positions, words, dtype=torch.float64, requires_grad=True)
    plain = ours.detach().clone().requires_grad_()
    targets = torch.randint(words, (positions,))
    found, expected = loss.cross_entropy_sum(ours * 2, targets), F.cross_entropy(plain * 2, targets, reduction="sum")
    (found * 0.3).backward()
    (expected * 0.3).backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours.grad, plain.grad)


def test_finite_differences():
    logits, step = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), 1e-6
    targets = torch.tensor([0, 5, 2, 2])
    loss.cross_entropy_sum(logits * 1, targets).backward()
    for place in range(logits.numel()):
        moved = torch.zeros(24, dtype=torch.float64)
        moved[place] = step
        ends = [loss.cross_entropy_sum(logits.detach() + s * moved.view(4, 6), targets) for s in (1, -1)]
        torch.testing.assert_close(logits.grad.view(-1)[place], (ends[0] - ends[1]) / (2 * step), atol=1e-8, rtol=1e-6)


def test_half_precision_logits_lose_nothing_but_the_gradients_rounding():
    logits = (torch.randn(20, 500) * 30).bfloat16().requires_grad_()
    targets = torch.randint(500, (20,))
    wide = logits.detach().float().requires_grad_()
    found, expected = loss.cross_entropy_sum(logits * 1, targets), F.cross_entropy(wide, targets, reduction="sum")
    found.backward()
    expected.backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(logits.grad, wide.grad.bfloat16())


def test_the_gradient_takes_the_place_of_the_logits():
    scores, places = torch.randn(30, 50, requires_grad=True), []
    logits = scores * 1
    logits.register_hook(lambda grad: places.append(grad.data_ptr()))
    loss.cross_entropy_sum(logits, torch.randint(50, (30,))).backward()
    assert places == [logits.data_ptr()]


def test_a_second_backward_pass_raises_instead_of_using_the_overwritten_logits():
    logits = torch.randn(3, 5, requires_grad=True)
    total = loss.cross_entropy_sum(logits * 1, torch.tensor([0, 1, 2]))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        total.backward()


ROWS = [
    {"input_ids": [5, 6, 7, 8, 9, 2], "labels": [-100, -100, -100, 8, 9, 2], "prompt_length": 3},
    {"input_ids": [5, 11, 2], "labels": [-100, 11, 2], "prompt_length": 1},
    {"input_ids": [5, 6, 7, 8, 9, 10, 11, 2], "labels": [-100] * 7 + [2], "prompt_length": 7},
]


def lora(model):
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False)
    )
    return adapted.double()


def prompt_tuning(model):
    return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).double()


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("adapt", [lora, prompt_tuning])
def test_generation_equals_full_logits(llama, adapt):
    torch.manual_seed(1)
    model, batch = adapt(llama), pad(ROWS, 0)
    task = registry.build(GenerationConfig())
    seen = []
    words = llama.config.vocab_size
    head = next(m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == words)
    hook = head.register_forward_hook(lambda _, inputs, logits: seen.append(logits.numel() // words))
    found = task.loss(model, batch)
    found.total.backward()
    ours = gradients(model)
    hook.remove()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logits = logits[:, -batch["input_ids"].shape[1] :]
    targets = batch["labels"][:, 1:].reshape(-1)
    plain = F.cross_entropy(logits[:, :-1].reshape(len(targets), -1), targets, ignore_index=-100, reduction="sum")
    plain.backward()
    expected = gradients(model)
    assert seen == [6]
    assert found.weight == task.weight(batch) == 6
    torch.testing.assert_close(found.total, plain)
    assert ours.keys() == expected.keys()
    assert all(grad.abs().max() > 0 for grad in ours.values())
    torch.testing.assert_close(ours, expected)


def test_a_batch_with_nothing_to_learn_gives_zero_gradients(llama):
    model, batch = lora(llama), pad(ROWS, 0)
    batch["labels"].fill_(-100)
    for config in (GenerationConfig(), ClassificationConfig()):
        task = registry.build(config)
        task.labels, task.words = ["a", "b"], [7, 8]
        found = task.loss(model, batch)
        found.total.backward()
        assert (found.total.item(), found.weight) == (0, 0)
        grads = gradients(model)
        assert grads
        assert all((grad == 0).all() for grad in grads.values())


def test_label_words_equal_full_logits(llama):
    torch.manual_seed(1)
    model = lora(llama)
    task = registry.build(ClassificationConfig())
    task.labels, task.words = ["a", "b", "c"], [20, 7, 31]
    rows = [{"input_ids": ids, "labels": [-100] * (len(ids) - 1) + [k]} for ids, k in (([5, 6, 7], 2), ([8] * 6, 0))]
    batch = pad(rows, 0)
    found = task.loss(model, batch)
    found.total.backward()
    ours = gradients(model)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    last = torch.stack([logits[0, 2], logits[1, 5]])[:, [20, 7, 31]]
    plain = F.cross_entropy(last, torch.tensor([2, 0]), reduction="sum")
    plain.backward()
    assert found.weight == 2
    torch.testing.assert_close(found.total, plain, check_dtype=False)
    torch.testing.assert_close(ours, gradients(model))


def test_linear_head_reads_the_last_token_whatever_the_padding(make_llama):
    model = make_llama(labels=3)
    task = registry.build(ClassificationConfig(head="linear"))
    rows = [{"input_ids": ids, "labels": [-100] * (len(ids) - 1) + [k]} for ids, k in (([5, 6, 7], 2), ([8] * 6, 0))]
    together = task.loss(model, pad(rows, 0))
    apart = [task.loss(model, pad([row], 0)) for row in rows]
    assert together.weight == 2
    torch.testing.assert_close(together.total, apart[0].total + apart[1].total)
