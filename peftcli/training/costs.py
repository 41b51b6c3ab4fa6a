"""What a model's forms cost side by side: parameters, file, arithmetic, memory, latency; a few seconds in all.

The forms share one base: their modules are put in and taken out again, and nothing that was there is changed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median, quantiles
from typing import Any

import psutil
import safetensors.torch
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from peftcli.methods.contract import Form
from peftcli.models import precision
from peftcli.training import ledger
from peftcli.training.ledger import Ledger

ROWS = (1, 32)
"""Rows of the batches that are timed."""
SECONDS, TURNS = 2.0, 40
"""For how long the forms are timed in turn with each batch, and how often at most; once in any case."""
LONGEST = 10 * SECONDS
"""Seconds that one turn may take; a larger batch that would take longer is left out."""
INPUTS = ("pixel_values", "input_ids", "attention_mask")
ENOUGH = 20
"""Turns from which on there is a p95."""


def measure(
    model: nn.Module,
    forms: Sequence[Form],
    batches: Sequence[dict[str, Tensor]],
    chosen: str,
    device: torch.device,
    patience: float = 1.0,
) -> dict[str, Any]:
    """Count and time every form.

    Args:
        model: In evaluation mode for the time; afterwards as it was, bit for bit.
        forms: The base first.
        batches: Inputs of the forward pass, of so many rows as `ROWS` says each; the smallest first.
        chosen: Precision of the arithmetic.
        device: Where the model is.
        patience: Times as long, and as many turns, as `SECONDS` and `TURNS` say.

    Returns:
        `rows`, one for each form: `form`, `parameters`, `nonzero`, `file_bytes`, `flops` of one row's matrix products,
        `memory` (bytes of `weights`, and the most that tensors `beside` them hold at once, with the largest batch);
        `latency` by rows in a batch, `median` and `p95` in milliseconds and `ratio`, the median of its share of the
        base's time in the same turn. `precision`, `threads`, `device`; `whole`, there is no base with something
        beside it; `left_out`, sizes of batches that were too much.
    """
    was_training = model.training
    model.eval()
    with torch.no_grad(), precision.autocast(chosen, device):
        rows = [_count(model, form, batches[0]) for form in forms]
        done: dict[int, list[dict[str, Any]]] = {}
        for batch in batches:
            if done and not _affordable(rows, done, _rows(batch), device):
                continue
            with _learning(model, forms, False):
                for row, form in zip(rows, forms, strict=True):
                    row["memory"] = _held(model, form, batch)
            with _learning(model, forms, True):
                done[_rows(batch)] = _time(model, forms, batch, device, patience)
    for place, row in enumerate(rows):
        row["latency"] = {str(size): found[place] for size, found in done.items()}
    model.train(was_training)
    about = {"precision": chosen, "device": device.type, "threads": torch.get_num_threads()}
    about["whole"] = not isinstance(model, PeftModel)
    return {"rows": rows, **about, "left_out": [_rows(batch) for batch in batches if _rows(batch) not in done]}


def batches_of(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Inputs of the forward pass in batches of `ROWS`, made of a batch's rows, over and over where it has fewer."""
    given = {name: tensor for name, tensor in batch.items() if name in INPUTS}
    found = []
    for size in ROWS:
        index = torch.arange(size) % _rows(batch)
        parts = {name: tensor[index.to(tensor.device)] for name, tensor in given.items()}
        last = torch.channels_last  # as the image reader gives them
        found.append({n: t.contiguous(memory_format=last) if t.dim() == 4 else t for n, t in parts.items()})
    return found


@contextmanager
def _learning(model: nn.Module, forms: Sequence[Form], learning: bool) -> Iterator[None]:
    """Within it all weights of all forms are trained ones, or none is: autocast keeps what it has cast of those alone,
    and a form with more of them would seem faster, and larger."""
    modules = [model, *(module for form in forms for module in form.modules.values())]
    before = {p: p.requires_grad for module in modules for p in module.parameters() if p.is_floating_point()}
    try:
        for parameter in before:
            parameter.requires_grad_(learning)
        yield
    finally:
        for parameter, was in before.items():
            parameter.requires_grad_(was)


def _rows(batch: dict[str, Tensor]) -> int:
    return len(next(iter(batch.values())))


@contextmanager
def put(model: Any, form: Form) -> Iterator[None]:
    """Within it the model has the form's modules."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    before = {name: base.get_submodule(name) for name in form.modules}
    try:
        _place(base, form.modules)
        yield
    finally:
        _place(base, before)


def _place(base: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, module)


def _count(model: nn.Module, form: Form, batch: dict[str, Tensor]) -> dict[str, Any]:
    """What does not depend on the machine."""
    with put(model, form):
        held = [p for name, p in model.named_parameters() if ".original_module." not in name]
        with FlopCounterMode(display=False) as counter:
            model(**batch)
        return {
            "form": form.name,
            "parameters": sum(p.numel() for p in held),
            "nonzero": sum(int(p.count_nonzero()) for p in held),
            "file_bytes": _file_bytes(model),
            "flops": counter.get_total_flops() // _rows(batch),
        }


def _file_bytes(model: Any) -> int:
    """Size of the adapter's file; of a model that has none, of its own."""
    if isinstance(model, PeftModel):
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
        return len(safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    return sum(ledger.held_by(model).values())


def _held(model: nn.Module, form: Form, batch: dict[str, Tensor]) -> dict[str, int]:
    with put(model, form):
        book = Ledger([*model.parameters(), *model.buffers(), *batch.values()])
        with book:
            model(**batch)
        return {"weights": sum(ledger.held_by(model).values()), "beside": book.peak}


def _affordable(
    rows: list[dict[str, Any]], done: dict[int, list[dict[str, Any]]], size: int, device: torch.device
) -> bool:
    """Whether one turn of the forms with a larger batch takes a bearable time, and half of the free memory at most."""
    before = max(done)
    seconds = sum(found["median"] for found in done[before]) / 1e3 * size / before
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available
    return seconds <= LONGEST and max(row["memory"]["beside"] for row in rows) * size / before <= free / 2


def _time(
    model: nn.Module, forms: Sequence[Form], batch: dict[str, Tensor], device: torch.device, patience: float
) -> list[dict[str, Any]]:
    """All forms in turn, each turn from another one on; the first does not count where there are others."""
    turns: list[list[float]] = []
    began = time.perf_counter()
    until = began + SECONDS * patience
    while len(turns) < 2 or (len(turns) <= TURNS * patience and time.perf_counter() < until):
        turn, first = [0.0] * len(forms), len(turns) % len(forms)
        for place in (*range(first, len(forms)), *range(first)):
            with put(model, forms[place]):
                turn[place] = _once(model, batch, device)
        turns.append(turn)
        if len(turns) == 1 and sum(turn) > SECONDS * patience:
            break
    turns = turns[1:] or turns
    return [
        {
            "median": 1e3 * median(turn[place] for turn in turns),
            "p95": 1e3 * quantiles([turn[place] for turn in turns], n=20)[-1] if len(turns) >= ENOUGH else None,
            "ratio": median(turn[place] / turn[0] for turn in turns),
            "turns": len(turns),
        }
        for place in range(len(forms))
    ]


def _once(model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    model(**batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
