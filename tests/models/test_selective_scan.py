"""The scan against the plain recurrence, in float64."""

from __future__ import annotations

import pytest
import torch

from peftcli.models import selective_scan as module
from peftcli.models.selective_scan import selective_scan

ROWS, LENGTH, CHANNELS, STATES = 2, 11, 5, 3
INPUTS = ("x", "delta", "A", "B", "C", "state")


def recurrence(x, delta, A, B, C, state=None, resets=None):
    """One step after the other, with autograd's own gradient."""
    h_BDN = x.new_zeros(x.shape[0], x.shape[2], A.shape[1]) if state is None else state
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)
        if resets is not None:
            decay = decay * (~resets[:, t])[:, None, None]
        h_BDN = decay * h_BDN + (delta[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        outputs.append((h_BDN * C[:, t, None, :]).sum(-1))
    return torch.stack(outputs, 1), h_BDN


@pytest.fixture
def inputs() -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(ROWS, LENGTH, CHANNELS)] * 2 + [(CHANNELS, STATES)] + [(ROWS, LENGTH, STATES)] * 2
    x, delta, A, B, C = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    state = torch.randn(ROWS, CHANNELS, STATES, dtype=torch.float64)
    return [t.requires_grad_() for t in (x, torch.nn.functional.softplus(delta), -A.exp(), B, C, state)]


@pytest.fixture(params=[1, 4, LENGTH])
def chunk(request, monkeypatch) -> int:
    """Steps a chunk: one, an uneven cut, all."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", request.param * ROWS * CHANNELS * STATES)
    return request.param


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_outputs_and_gradients_are_the_recurrences(inputs, chunk, with_state, with_resets):
    given = inputs if with_state else [*inputs[:5], None]
    resets = torch.rand(ROWS, LENGTH) < 0.3 if with_resets else None
    ours, plain = selective_scan(*given, resets), recurrence(*given, resets)
    weights = [torch.randn_like(t) for t in plain]
    learnt = [t for t in given if t is not None]
    found, expected = (
        torch.autograd.grad(sum((o * w).sum() for o, w in zip(out, weights, strict=True)), learnt)
        for out in (ours, plain)
    )
    torch.testing.assert_close(ours, plain)
    for name, a, b in zip(INPUTS, found, expected, strict=False):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_are_finite_differences(inputs, chunk):
    resets = torch.rand(ROWS, LENGTH) < 0.3
    assert torch.autograd.gradcheck(lambda *given: selective_scan(*given, resets), inputs)


@pytest.mark.parametrize("learnt", INPUTS)
def test_one_input_alone_can_need_a_gradient(inputs, learnt):
    given = [t if name == learnt else t.detach() for name, t in zip(INPUTS, inputs, strict=True)]
    tensor = given[INPUTS.index(learnt)]
    (found,) = torch.autograd.grad(selective_scan(*given)[0].square().sum(), tensor)
    (expected,) = torch.autograd.grad(recurrence(*given)[0].square().sum(), tensor)
    torch.testing.assert_close(found, expected)


def test_two_halves_are_the_whole(inputs):
    x, delta, A, B, C, state = inputs
    whole, last = selective_scan(x, delta, A, B, C, state)
    first, middle = selective_scan(x[:, :4], delta[:, :4], A, B[:, :4], C[:, :4], state)
    second, end = selective_scan(x[:, 4:], delta[:, 4:], A, B[:, 4:], C[:, 4:], middle)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, last)


def test_a_reset_makes_packed_rows_independent(inputs):
    x, delta, A, B, C, _ = inputs
    resets = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    resets[:, 6] = True
    packed, _ = selective_scan(x, delta, A, B, C, resets_BL=resets)
    alone, _ = selective_scan(x[:, 6:], delta[:, 6:], A, B[:, 6:], C[:, 6:])
    torch.testing.assert_close(packed[:, 6:], alone)


def test_half_inputs_keep_a_wide_state(inputs):
    x, delta, A, B, C, _ = (t.detach() for t in inputs)
    delta = delta.float()
    low = [x.bfloat16(), delta, A.float(), B.bfloat16(), C.bfloat16()]
    with torch.autocast("cpu", torch.bfloat16):
        y, last = selective_scan(*low)
    exact, exact_last = recurrence(*(t.double() for t in low))
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(last.double(), exact_last, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-6)


def test_long_decays_stay_finite():
    x = torch.ones(1, 600, 2)
    A = torch.tensor([[-1e4, -1e-6], [-1.0, -50.0]])
    y, last = selective_scan(x, torch.full_like(x, 5.0), A, torch.ones(1, 600, 2), torch.ones(1, 600, 2))
    assert y.isfinite().all()
    assert last.isfinite().all()


def test_kept_memory_is_a_state_a_chunk(inputs, chunk):
    y, _ = selective_scan(*inputs)
    starts = y.grad_fn.saved_tensors[-1]
    assert starts.shape == (-(-LENGTH // chunk), ROWS, STATES, CHANNELS)
    with torch.no_grad():
        assert selective_scan(*inputs)[0].grad_fn is None
