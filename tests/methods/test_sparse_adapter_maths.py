"""Proximal steps against numeric minima, the lasso's conditions, budgets with ties, scores, planted support, files.

Shapes: as in peftcli/methods/sparse_adapter/maths.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from peftcli.methods.sparse_adapter import compaction, files, maths
from peftcli.methods.sparse_adapter.config import SparseAdapterConfig
from peftcli.methods.sparse_adapter.layer import SparseAdapterLayer
from peftcli.methods.sparse_adapter.pruning import Pruning, parts


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(v: Tensor, l1: float, group: float) -> Tensor:
    """The minimum of 1/2 |x - v|^2 + l1 |x|_1 + group |x|_2, by the norm that makes its slope vanish."""
    inner = [brentq(lambda x, t=t: x - abs(t) + l1, -l1, abs(t)) if abs(t) > l1 else 0.0 for t in v.tolist()]
    left = torch.tensor(inner, dtype=v.dtype).clamp_min(0) * v.sign()
    if left.norm() <= group:
        return torch.zeros_like(v)
    # x_i (1 + group / norm) = left_i, so norm + group = |left|
    norm = brentq(lambda n: (left / (1 + group / n)).norm().item() - n, 1e-12, left.norm().item() + 1, xtol=1e-14)
    return left / (1 + group / norm)


@pytest.mark.parametrize(("l1", "group"), [(0.4, 0.0), (0.0, 0.7), (0.4, 0.7), (0.4, 9.0)])
def test_proximal_steps_are_the_numeric_minimum(l1: float, group: float) -> None:
    for seed in range(5):
        v = drawn(7, seed=seed)
        expected = both(v, l1, group)
        x = maths.soft(v, l1)
        D_RI, U_ER = x[None, :4], x[4:, None]
        factor_R = maths.unit_factors(D_RI, U_ER, None, group / math.sqrt(7))
        found = x * factor_R
        assert (found - expected).abs().max() < 1e-8
        assert torch.equal(found == 0, expected.abs() < 1e-12)  # zeros are exact


def test_proximal_steps_never_expand_and_keep_zero() -> None:
    v, w = drawn(50, seed=1), drawn(50, seed=2)
    assert (maths.soft(v, 0.3) - maths.soft(w, 0.3)).norm() <= (v - w).norm()
    assert not maths.soft(torch.zeros(3), 0.1).any()
    assert not maths.unit_factors(torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2), 0.1).any()
    assert torch.equal(maths.soft(v, 0.0), v)


def test_a_gate_is_a_member_of_its_unit() -> None:
    D_RI, U_ER, gate_R = drawn(2, 3), drawn(4, 2, seed=1), torch.ones(2, dtype=torch.float64)
    norm_R = (D_RI.square().sum(1) + U_ER.square().sum(0) + 1).sqrt()
    found = maths.unit_factors(D_RI, U_ER, gate_R, 0.1)
    assert torch.allclose(found, 1 - 0.1 * math.sqrt(8) / norm_R, atol=1e-12)


def test_adams_threshold_is_that_of_its_metric_and_at_most_its_rate() -> None:
    squares = torch.tensor([0.0, 1e-12, 4e-4], dtype=torch.float64)
    found = maths.adam_threshold(0.01, 1e-3, squares, 1, 0.999, 1e-8)
    assert found[:2].tolist() == [0.01, 0.01]
    assert found[2] == pytest.approx(0.01 * 1e-3 / (math.sqrt(4e-4 / 0.001) + 1e-8))


def regression(d: int, support: list[int], rows: int = 400) -> tuple[SparseAdapterLayer, Tensor, Tensor]:
    """A linear module whose D is the identity, so that its U [1, d] are the weights of a linear regression."""
    torch.manual_seed(0)
    base = nn.Linear(d, 1).double().requires_grad_(False)
    base.weight.zero_(), base.bias.zero_()
    layer = SparseAdapterLayer(base)
    layer.update_layer("default", SparseAdapterConfig(r=d, activation="linear", gate=False, placement="parallel"), None)
    layer.sparse_down["default"].requires_grad_(False).copy_(torch.eye(d))
    x_Bd = drawn(rows, d, seed=3)
    true_d = torch.zeros(d, dtype=torch.float64)
    true_d[support] = torch.tensor([1.0, -1.0] * d, dtype=torch.float64)[: len(support)]
    return layer, x_Bd, (x_Bd @ true_d)[:, None] + 0.3 * drawn(rows, 1, seed=4)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_training_comes_to_the_conditions_of_the_lasso(kind: type) -> None:
    layer, x_Bd, y_B1 = regression(10, [1, 4, 7])
    U_1d, l1 = layer.sparse_up["default"], 0.05
    optimiser = kind([U_1d], lr=0.1, weight_decay=0.0)
    pruning, found = Pruning("unit", "magnitude", "default"), parts(layer, "default")
    for step in range(1500):
        optimiser.param_groups[0]["lr"] = 0.1 * 0.99 ** (step / 2)
        optimiser.zero_grad()
        (layer(x_Bd) - y_B1).square().mean().div(2).backward()
        optimiser.step()
        pruning.proximal(found, optimiser, l1, 0.0)
    optimiser.zero_grad()
    (layer(x_Bd) - y_B1).square().mean().div(2).backward()
    on = U_1d.detach() != 0
    assert on.flatten().nonzero().flatten().tolist() == [1, 4, 7]
    assert (U_1d.grad[~on].abs() <= l1).all()
    assert torch.allclose(U_1d.grad[on], -l1 * U_1d.detach()[on].sign(), atol=2e-3)


@pytest.mark.parametrize("importance", ["first_order", "magnitude", "fisher"])
def test_finds_the_units_that_were_planted(importance: str) -> None:
    support = [3, 8, 13, 21, 22, 30]
    layer, x_Bd, y_B1 = regression(40, support)
    optimiser = torch.optim.AdamW([layer.sparse_up["default"]], lr=0.02)
    pruning, modules = Pruning("unit", importance, "default"), parts(layer, "default")
    for step in range(1, 61):
        optimiser.zero_grad()
        (layer(x_Bd) - y_B1).square().mean().backward()
        pruning.watch(modules)
        optimiser.step()
        pruning.proximal(modules, optimiser, 1e-3, 1e-3)
        if step % 3 == 0:
            pruning.prune(modules, maths.cubic(step, 60, 0.0, 1 - 6 / 40), 0, optimiser)
    found = set(layer.live("units", "default").nonzero().flatten().tolist())
    f1 = 2 * len(found & set(support)) / (len(found) + len(support))
    assert len(found) == 6
    # The squared gradient alone forgets a weight as soon as it has come to its place.
    assert f1 > (0.9 if importance != "fisher" else 0.1)


def test_the_schedule_is_a_cubic_between_its_ends() -> None:
    path = [maths.cubic(step, 20, 0.1, 0.8) for step in range(25)]
    assert path[0] == pytest.approx(0.1)
    assert path[20:] == [0.8] * 5
    assert path == sorted(path)
    assert path[10] == pytest.approx(0.8 - 0.7 / 8)


def test_a_budget_is_kept_exactly_through_ties_and_floors() -> None:
    scores = [torch.zeros(5), torch.ones(4), torch.tensor([1.0, 3.0])]
    everything = [torch.ones(len(one), dtype=torch.bool) for one in scores]
    for count in range(12):
        assert sum(int(one.sum()) for one in maths.keep(scores, everything, count)) == count
    first = maths.keep(scores, everything, 3)
    assert [one.tolist() for one in first] == [[False] * 5, [True, True, False, False], [False, True]]
    assert [int(one.sum()) for one in maths.keep(scores, everything, 4, floor=1)] == [1, 2, 1]
    again = maths.keep([torch.full((5,), 9.0), *scores[1:]], first, 11)  # what is gone does not come back
    assert [one.tolist() for one in again] == [one.tolist() for one in first]
    assert [maths.kept(s, 10) for s in (0.0, 0.25, 0.8, 0.95)] == [10, 8, 2, 1]


def test_first_order_scores_are_weight_times_slope() -> None:
    layer, x_Bd, y_B1 = regression(6, [1, 2])
    U_1d = layer.sparse_up["default"]
    with torch.no_grad():
        U_1d.copy_(drawn(1, 6, seed=9))
    loss = lambda: (layer(x_Bd) - y_B1).square().mean()  # noqa: E731
    loss().backward()
    score_1d = maths.score("first_order", U_1d.detach(), U_1d.grad)
    for place in range(6):
        with torch.no_grad():
            U_1d[0, place] += 1e-5
            above = loss()
            U_1d[0, place] -= 2e-5
            below = loss()
            U_1d[0, place] += 1e-5
            slope = (above - below) / 2e-5
        assert score_1d[0, place].item() == pytest.approx(abs(U_1d[0, place].item() * slope.item()), rel=1e-5)


def test_magnitude_ranks_small_matrices_like_large_ones() -> None:
    weight = drawn(3, 4)
    assert torch.allclose(maths.magnitude(1e-9 * weight), maths.magnitude(weight))
    assert not maths.magnitude(torch.zeros(3)).any()


def test_without_any_score_magnitude_decides() -> None:
    layer, _, _ = regression(6, [1])
    with torch.no_grad():
        layer.sparse_up["default"].copy_(torch.tensor([[0.0, 5, 0, 3, 1, 0]]))
    Pruning("unit", "first_order", "default").prune(parts(layer, "default"), 0.5, 0)
    assert layer.live("units", "default").nonzero().flatten().tolist() == [1, 3, 4]


@pytest.mark.parametrize("share", [0.0, 0.002, 0.1, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sparse_matrix_comes_back_bit_for_bit(share: float, dtype: torch.dtype) -> None:
    matrix = drawn(37, 41).to(dtype)
    matrix[drawn(37 * 41, seed=5).argsort().argsort().view(37, 41) >= share * matrix.numel()] = 0
    parts = files.encode(matrix)
    values = int(matrix.count_nonzero())
    held = sum(part.numel() * part.element_size() for part in parts.values())
    assert bool(parts) == (share < 1)
    if parts:
        assert held <= values * matrix.element_size() + min(values * 4, -(-matrix.numel() // 8))
        assert torch.equal(files.decode(parts, matrix.shape), matrix)


def test_damaged_parts_are_refused() -> None:
    matrix = torch.zeros(20, 20)
    matrix[3, 4:8] = 1.0
    parts = files.encode(matrix)
    with pytest.raises(ValueError, match="do not make a matrix"):
        files.decode({**parts, "values": parts["values"][1:]}, matrix.shape)
    with pytest.raises(ValueError, match="do not make a matrix"):
        files.decode(parts, torch.Size([2, 3]))
    with pytest.raises(ValueError, match="do not rise"):
        files.decode({**parts, "gaps": parts["gaps"].to(torch.int16) - 70}, matrix.shape)


def test_a_constant_unit_becomes_a_bias() -> None:
    torch.manual_seed(0)
    layer = SparseAdapterLayer(nn.Linear(4, 4).requires_grad_(False))
    layer.update_layer("default", SparseAdapterConfig(r=5), None)
    tensors = layer.tensors("default")
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.normal_()
        tensors["down"][1] = 0  # constant
        tensors["up"][:, 3] = 0  # dead
        tensors["gate"][4] = 0  # dead
    x = torch.randn(3, 4)
    before = layer(x)
    compaction.shrink(layer, "default")
    assert layer.units["default"] == [0, 2]
    assert {kind: tuple(t.shape) for kind, t in layer.tensors("default").items()} == {
        "down": (2, 4), "up": (4, 2), "down_bias": (2,), "up_bias": (4,), "gate": (2,),
    }  # fmt: skip
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-6)
    with torch.no_grad():
        layer.sparse_down["default"].zero_()
    before = layer(x)
    compaction.shrink(layer, "default")  # only a bias is left
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-6)
    with torch.no_grad():
        layer.sparse_up_bias["default"].zero_()
    compaction.shrink(layer, "default")
    assert torch.equal(layer(x), layer.base_layer(x))
    assert not layer.units


@pytest.mark.parametrize("structure", ["unit", "weight"])
def test_constants_outlive_the_masks_of_their_units(structure: str) -> None:
    torch.manual_seed(0)
    layer = SparseAdapterLayer(nn.Linear(4, 4).requires_grad_(False))
    layer.update_layer("default", SparseAdapterConfig(r=5), None)
    with torch.no_grad():
        for tensor in layer.tensors("default").values():
            tensor.normal_()
        layer.sparse_down["default"].zero_()
    live = {"units": torch.arange(5) < 3}
    if structure == "weight":
        live = {"down": torch.zeros(5, 4, dtype=torch.bool), "up": torch.ones(4, 5, dtype=torch.bool)}
    layer.prune("default", live)
    x = torch.randn(3, 4)
    before = layer(x)
    compaction.shrink(layer, "default")
    assert layer.units["default"] == []
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-6)


def test_what_has_no_weights_between_groups_does_not_merge() -> None:
    layer = SparseAdapterLayer(nn.Conv2d(4, 4, 3, padding=1, groups=2).requires_grad_(False))
    layer.update_layer("default", SparseAdapterConfig(r=2, activation="linear"), None)
    with pytest.raises(NotImplementedError, match="groups"):
        layer.merge()
