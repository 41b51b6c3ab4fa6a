"""Named checks around the loop: does everything trained learn, does nothing frozen move, is the start the base."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
import xxhash
from torch import nn

from peftcli.config.errors import CheckFailed
from peftcli.training import seeds, sharding

IDENTITY_SHARE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Mean difference from the base's outputs before step 1, as a share of their spread, by arithmetic. A method that
computes the same function in another order (DoRA, PiSSA, full) is off by rounding: 3 % in bf16 on SmolLM2-135M."""


@contextmanager
def _kept(model: nn.Module, tensors: Iterable[torch.Tensor]):
    """Inside, the tensors may be changed; afterwards they and the model's mode are back, bit for bit."""
    before = [(t, t.detach().clone()) for t in tensors]
    mode = model.training
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        model.train(mode)
        model.zero_grad(set_to_none=True)


def outputs(model: nn.Module, batch: dict[str, torch.Tensor], tokens: int = 32) -> torch.Tensor:
    """Logits of a batch's first row, at most `tokens` tokens of it, in float32; dropout off."""
    inputs = {k: v[:1, :tokens] if v.ndim == 2 else v[:1] for k, v in batch.items() if k in FORWARD_KEYS}
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(**inputs).logits.detach().float()
    finally:
        model.train(mode)


FORWARD_KEYS = frozenset({"input_ids", "attention_mask", "pixel_values"})


def identity_start(before: torch.Tensor, after: torch.Tensor, precision: str) -> float:
    """Compare outputs before and after attaching; return the mean difference as a share of the spread.

    Raises:
        CheckFailed: They differ by more than rounding.
    """
    after = after[:, -before.shape[1] :] if before.ndim == 3 else after
    share = ((after - before).abs().mean() / before.std().clamp_min(1e-12)).item()
    if not share <= IDENTITY_SHARE[precision]:
        raise CheckFailed(
            "identity-start",
            f"before the first step the outputs differ from the base's by {share:.3g} of their spread "
            f"(allowed in {precision}: {IDENTITY_SHARE[precision]})",
            "an initialisation that changes the function must say so in its capabilities",
        )
    return share


def dead_adapter(
    model: nn.Module, loss: Callable[[dict], torch.Tensor], batches: Iterable[dict], seed: int
) -> tuple[int, int]:
    """Check that every trained tensor gets a gradient; return how many tensors and batches it took.

    A plain look at the first gradient would blame zero-initialised factors, so the trained tensors are moved a
    little first, and put back bit for bit afterwards. The model stays in training mode: some kernels differ there.

    Args:
        model: With the adapter attached.
        loss: Gives a batch's loss, a scalar with a graph.
        batches: Probe batches; the next one is only used while a tensor still has no gradient.
        seed: The run's seed.

    Raises:
        CheckFailed: A trained tensor has no gradient, or only zeros, on all probe batches.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise CheckFailed("dead-adapter", "nothing in the model is trained", "look at the method's targets")
    generator = torch.Generator().manual_seed(seeds.derive(seed, "dead-adapter"))
    waiting, used = set(trained), 0
    with _kept(model, [*trained.values(), *model.buffers()]):
        model.train()
        with torch.no_grad():
            for p in trained.values():
                size = 0.1 * p.float().std().item() if p.numel() > 1 else 0.0
                noise = torch.randn(p.shape, generator=generator) * (size if size > 0 else 0.02)
                p.add_(noise.to(p.device, p.dtype))
        for batch in batches:
            used += 1
            loss(batch).backward()
            waiting = {n for n in waiting if (grad := trained[n].grad) is None or not grad.any()}
            if not waiting:
                return len(trained), used
    names = sorted(waiting)
    raise CheckFailed(
        "dead-adapter",
        f"{len(names)} of {len(trained)} trained tensors get no gradient: {', '.join(names[:5])}"
        + (f" and {len(names) - 5} more" if len(names) > 5 else ""),
        f"the model's forward pass bypasses these modules, or none of {used} rows uses them; choose other targets",
    )


def fingerprints(model: nn.Module) -> dict[str, int]:
    """A checksum of the bits of every frozen parameter and every buffer."""
    frozen = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
    frozen.update({n: b.detach() for n, b in model.named_buffers()})
    return {n: checksum(t) for n, t in frozen.items() if t.numel()}


def combined(fingerprint: dict[str, int]) -> str:
    """One checksum of many, by sorted name."""
    return xxhash.xxh3_128_hexdigest(
        "".join(f"{name} {value}\n" for name, value in sorted(fingerprint.items())).encode()
    )


def checksum(tensor: torch.Tensor) -> int:
    """Of a tensor's bits, of this process's part of one that is cut up."""
    tensor = sharding.part(tensor)
    return xxhash.xxh3_64_intdigest(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def frozen_moved(before: dict[str, int], model: nn.Module, trained: set[str]) -> int:
    """Check that what no stage trained has kept its bits; return how many tensors were compared.

    Raises:
        CheckFailed: A frozen tensor or a BatchNorm statistic changed.
    """
    now = fingerprints(model)
    moved = sorted(n for n, value in before.items() if n not in trained and n in now and now[n] != value)
    if moved:
        raise CheckFailed(
            "frozen-moved",
            f"{len(moved)} frozen tensors changed in training: {', '.join(moved[:5])}",
            "the adapter file would not hold this change; freeze BatchNorm, or train these modules openly",
        )
    return len(before)


def finite(loss: float, grad_norm: float, step: int) -> None:
    """Stop at a loss or gradient norm that is not a number.

    Raises:
        CheckFailed: With the step.
    """
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if value != value or value in (float("inf"), float("-inf")):
            raise CheckFailed(
                "non-finite-loss",
                f"the {name} is {value} at step {step}",
                "the checkpoint before it is kept; try a lower optim.lr or optim.clip_norm, or training.precision=fp32",
            )


ZERO_STEPS = 50
"""Steps in a row with something to learn and a gradient of exactly zero that end a run. Methods that train a few rows
of the embedding have some, where a batch has none of their tokens."""


def zero_gradient(norm: float, in_a_row: int, step: int) -> int:
    """Count steps in a row whose gradient is exactly zero; a finite loss that nothing can move is no success.

    Returns:
        The new count.

    Raises:
        CheckFailed: There were `ZERO_STEPS` of them.
    """
    if norm != 0.0:
        return 0
    if in_a_row + 1 >= ZERO_STEPS:
        raise CheckFailed(
            "zero-gradient",
            f"the gradient has been exactly zero for {ZERO_STEPS} steps, up to step {step}",
            "the weights have left the range in which the model answers; try a lower optim.lr",
        )
    return in_a_row + 1
