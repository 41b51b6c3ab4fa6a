"""Row and column spaces in float64: projectors, truncation by weight and by data, what a layer uses, convolutions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from peftcli.methods.rowcol import attention, convolution, maths, tying, usage
from peftcli.methods.rowcol.attention import Projections
from peftcli.methods.rowcol.moments import Moment

SHAPES = [(12, 12), (20, 9), (7, 18)]


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(inputs: int, rows: int = 400, used: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [N, I] of falling size along random directions, and their second moment."""
    directions = torch.linalg.qr(draw(inputs, inputs, seed=5)).Q[: used or inputs]
    sizes = 0.7 ** torch.arange(len(directions), dtype=torch.float64)
    x = draw(rows, len(directions), seed=6) * sizes @ directions
    return x, x.T @ x / len(x)


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_bases_are_orthonormal_and_project(outputs, inputs):
    _, C = moment(inputs)
    W = draw(outputs, inputs)
    for rank in (1, 4, min(outputs, inputs)):
        U, _, V = maths.leading(W, rank)
        for basis in (U, V, maths.input_basis(C, rank)[0], maths.output_basis(W, C, rank)[0]):
            torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=torch.float64), atol=1e-10, rtol=0)
            P = maths.projector(basis)
            torch.testing.assert_close(P @ P, P, atol=1e-10, rtol=0)
            torch.testing.assert_close(P, P.T, atol=1e-10, rtol=0)
            assert round(P.trace().item(), 8) == rank


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("by_data", [False, True])
def test_truncation_loses_just_the_tail_and_nothing_at_full_rank(outputs, inputs, by_data):
    W, C = draw(outputs, inputs), moment(inputs)[1] if by_data else None
    sigma, last = maths.spectrum(W, C), float("inf")
    for rank in range(1, min(outputs, inputs) + 1):
        found = maths.truncated(W, C, rank)
        lost = maths.error(W, found.product(), C)
        assert lost == pytest.approx(sigma[rank:].square().sum().sqrt().item(), abs=1e-7)
        assert lost <= last + 1e-12
        last = lost
        torch.testing.assert_close(found.balanced().product(), found.product(), atol=1e-12, rtol=0)
        torch.testing.assert_close(found.balanced().expand.norm(dim=0), found.balanced().reduce.norm(dim=1))
    torch.testing.assert_close(found.product(), W, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_on_the_data_no_matrix_of_its_rank_comes_nearer(outputs, inputs):
    W, (x, C) = draw(outputs, inputs), moment(inputs)
    for rank in (1, 3, 6):
        by_data, by_weight = (maths.truncated(W, given, rank).product() for given in (C, None))
        on_data = ((x @ (W - by_data).T).square().sum() / len(x)).sqrt().item()
        assert on_data == pytest.approx(maths.error(W, by_data, C), rel=1e-10)
        assert on_data <= maths.error(W, by_weight, C) * (1 + 1e-12)
        assert maths.error(W, by_weight) <= maths.error(W, by_data) * (1 + 1e-12)
        assert min(_alternating(W, C, rank, seed) for seed in range(3)) >= on_data * (1 - 1e-9)


def _alternating(W: torch.Tensor, C: torch.Tensor, rank: int, seed: int) -> float:
    """The loss on the data of two factors found by alternating least squares from a random start."""
    A, L = draw(rank, W.shape[1], seed=seed), maths.root(C)
    for _ in range(200):
        B = (W @ L) @ torch.linalg.pinv(A @ L)
        A = torch.linalg.lstsq(B, W).solution
    return maths.error(W, B @ A, C)


def test_inputs_that_live_in_a_subspace_are_answered_exactly_at_its_dimension():
    W, (x, C) = draw(16, 14), moment(14, used=5)
    assert torch.linalg.matrix_rank(W) == 14
    torch.testing.assert_close(x @ maths.truncated(W, C, 5).product().T, x @ W.T, atol=1e-10, rtol=0)
    assert (x @ maths.truncated(W, C, 4).product().T - x @ W.T).abs().max() > 1e-3
    assert (x @ maths.truncated(W, None, 5).product().T - x @ W.T).abs().max() > 1e-3
    used = usage.measure(W, C, eps=1e-12)
    assert (used.row_rank, used.column_rank, used.rank) == (5, 5, 5)
    assert (used.row, used.column, used.both) == (5 / 14, 5 / 16, 5 / 14)
    assert usage.mean_layer_utilisation([used, used]) == 5 / 14
    V, energies = maths.input_basis(C, 5)
    torch.testing.assert_close(x @ maths.projector(V), x, atol=1e-10, rtol=0)
    assert energies.sum().item() == pytest.approx(C.trace().item())


def test_directions_that_no_input_reaches_are_ordered_by_the_weight():
    W, C = draw(10, 12), moment(12, used=4)[1]
    errors = [maths.error(W, maths.truncated(W, C, rank).product()) for rank in range(4, 11)]
    assert errors[-1] < 1e-10
    assert errors == sorted(errors, reverse=True)


def test_a_large_matrix_gives_its_few_leading_directions_and_leaves_the_seed_alone():
    U, V = torch.linalg.qr(draw(1100, 40)).Q, torch.linalg.qr(draw(1200, 40, seed=1)).Q
    sigma = 0.9 ** torch.arange(40, dtype=torch.float64)
    W = (U * sigma) @ V.T
    before = torch.random.get_rng_state()
    found = maths.leading(W, 12)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.testing.assert_close(found[1], sigma[:12], rtol=1e-8, atol=0)
    torch.testing.assert_close(maths.projector(found[0]), maths.projector(U[:, :12]), atol=1e-6, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(found, maths.leading(W, 12), strict=True))


def test_energy_and_break_even():
    assert [maths.rank_for([4, 3, 2, 1], share) for share in (0.1, 0.4, 0.7, 0.71, 1.0)] == [1, 1, 2, 3, 4]
    assert maths.rank_for([4, 3], 0.9, whole=10) == 2
    for outputs, inputs in ((384, 384), (1536, 384), (3, 2), (1, 9)):
        rank = maths.break_even(outputs, inputs)
        assert rank * (outputs + inputs) < outputs * inputs <= (rank + 1) * (outputs + inputs)


GEOMETRIES = [
    {"kernel_size": size, "stride": stride, "padding": padding, "dilation": dilation}
    for size in (1, 3, (3, 1))
    for stride in (1, 2)
    for padding in (0, 1, (2, 1))
    for dilation in (1, 2)
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_smaller_convolutions_in_a_row_are_the_projected_one(geometry):
    layer = torch.nn.Conv2d(6, 10, bias=True, **geometry).double()
    x, W = draw(2, 6, 11, 9), layer.weight.detach()
    rows = convolution.patches(x, layer)
    y = layer(x)
    torch.testing.assert_close(rows @ W.flatten(1).T + layer.bias, y.movedim(1, -1).flatten(0, -2))
    way = {name: geometry[name] for name in ("stride", "padding", "dilation")}
    C = rows.T @ rows / len(rows)
    reduce, expand = convolution.by_filters(W, C, 4)
    projected = (expand.flatten(1) @ reduce.flatten(1)).view_as(W)
    got = functional.conv2d(functional.conv2d(x, reduce, **way), expand, layer.bias)
    torch.testing.assert_close(got, functional.conv2d(x, projected, layer.bias, **way))
    first, core, last = convolution.tucker2(W, 3, 3)
    projected = torch.einsum("oq,qphv,pi->oihv", last[:, :, 0, 0], core, first[:, :, 0, 0])
    got = functional.conv2d(functional.conv2d(functional.conv2d(x, first), core, **way), last, layer.bias)
    torch.testing.assert_close(got, functional.conv2d(x, projected, layer.bias, **way))
    count = convolution.tucker2_parameters(10, 6, W[0, 0].numel(), 3, 3)
    assert count == sum(kernel.numel() for kernel in (first, core, last))


def test_tucker_is_exact_at_full_rank_and_its_turns_improve_it():
    W = draw(10, 6, 3, 3)

    def lost(inputs, outputs, **given):
        first, core, last = convolution.tucker2(W, inputs, outputs, **given)
        return (torch.einsum("oq,qphv,pi->oihv", last[:, :, 0, 0], core, first[:, :, 0, 0]) - W).norm().item()

    assert lost(6, 10) < 1e-10
    assert lost(3, 4) < lost(3, 4, sweeps=0)
    assert lost(3, 4) >= lost(4, 4) >= lost(5, 8) > 0


KEY_BIAS = draw(12, seed=9)


def heads_out(p: Projections, x: torch.Tensor, heads: int, scale: float) -> torch.Tensor:
    def split(m, bias):
        return (x @ m.T + (0 if bias is None else bias)).unflatten(-1, (heads, -1)).transpose(1, 2)

    q, k, v = split(p.q, p.q_bias), split(p.k, None if p.v_bias is None else KEY_BIAS), split(p.v, p.v_bias)
    y = (q @ k.mT * scale).softmax(-1) @ v
    return y.transpose(1, 2).flatten(2) @ p.o.T + p.o_bias


def values(p: Projections, heads: int) -> torch.Tensor:
    """W_o W_v of each head."""
    return p.o.unflatten(1, (heads, -1)).transpose(0, 1) @ p.v.unflatten(0, (heads, -1))


def test_heads_are_cut_in_pairs():
    heads, width, D = 3, 4, 12
    given = Projections(*(draw(12, D, seed=s) for s in range(4)), draw(12, seed=5), draw(D, seed=6), draw(12, seed=7))
    x = draw(2, 5, D, seed=8) * 0.3
    y = heads_out(given, x, heads, width**-0.5)
    C = moment(D)[1]
    centre = 0.3 * draw(D, seed=9)
    for seen in (None, Moment(C + torch.outer(centre, centre), centre, 1)):
        same = attention.joint(given, heads, width, seen)
        assert same.q.shape == given.q.shape
        torch.testing.assert_close(heads_out(same, x, heads, width**-0.5), y, atol=1e-10, rtol=0)
        qk, vo = attention.energies(given, heads, seen)
        assert qk.shape == vo.shape == (width,)
        for smaller in (3, 2):
            found = attention.joint(given, heads, smaller, seen)
            assert (found.q.shape, found.o.shape) == ((heads * smaller, D), (D, heads * smaller))
            pairs = zip(values(given, heads), values(found, heads), strict=True)
            lost = sum(maths.error(a, b, None if seen is None else C) ** 2 for a, b in pairs)
            assert lost == pytest.approx(vo[smaller:].sum().item(), rel=1e-8)


def test_heads_lose_what_their_energies_say_of_logits_less_their_mean_and_nothing_of_the_mean_output():
    heads, D, N = 2, 10, 4000
    given = Projections(
        *(draw(8, D, seed=s) for s in range(3)), draw(D, 8, seed=3), 3 * draw(8, seed=5), draw(D, seed=6)
    )
    x = draw(N, D, seed=8) @ draw(D, D, seed=9) + 2 * draw(D, seed=10)
    seen = Moment(x.T @ x, x.sum(0), N)

    def logits(p: Projections) -> torch.Tensor:
        q = (x @ p.q.T + p.q_bias).unflatten(1, (heads, -1)).transpose(0, 1)
        k = ((x - x.mean(0)) @ p.k.T).unflatten(1, (heads, -1)).transpose(0, 1)
        return q @ k.mT  # a constant over the keys is nothing to a softmax

    def mean_output(p: Projections) -> torch.Tensor:
        return (x @ p.v.T @ p.o.T + p.o_bias).mean(0)

    found = attention.joint(given, heads, 2, seen)
    lost = (logits(given) - logits(found)).square().sum() / N**2
    assert lost.item() == pytest.approx(attention.energies(given, heads, seen)[0][2:].sum().item(), rel=1e-8)
    torch.testing.assert_close(mean_output(found), mean_output(given), atol=1e-9, rtol=0)


def test_a_pair_of_heads_matrices_is_better_than_each_on_its_own():
    q, k = draw(1, 8, 12), draw(1, 8, 12, seed=1)
    I = torch.eye(12, dtype=torch.float64)  # noqa: E741
    a, b = attention.product(q, k, I, I, 4)
    alone = [maths.truncated(m[0], None, 4).product() for m in (q, k)]
    assert (a[0].T @ b[0] - q[0].T @ k[0]).norm() < (alone[0].T @ alone[1] - q[0].T @ k[0]).norm()


def test_the_mean_is_the_best_tie_and_a_diagonal_makes_it_better():
    up, down = draw(9, 5), draw(5, 9, seed=1)

    def lost(W, s=1.0):
        return ((W - up).square().sum() + (W * s - down.T).square().sum()).item()

    W = tying.tie(up, down)
    assert min(lost(W + 1e-3 * draw(9, 5, seed=s)) for s in range(20)) > lost(W)
    V, s = tying.with_diagonal(up, down)
    assert lost(V, s[:, None]) < lost(W)
    for seed in range(20):
        moved = V + 1e-3 * draw(9, 5, seed=seed), s[:, None] + 1e-3 * draw(9, 1, seed=seed + 50)
        assert lost(*moved) > lost(V, s[:, None])
    assert tying.tie_error(up, up.T) == 0
    assert 0.8 < tying.tie_error(up, down) < 1.2


def test_rescaling_changes_nothing_behind_a_relu_and_brings_the_pair_nearer():
    up, bias, down, x = draw(9, 5) * draw(9, 1, seed=3).exp(), draw(9, seed=4), draw(5, 9, seed=1), draw(20, 5, seed=2)
    c = tying.balance(up, down)
    balanced = c[:, None] * up, down / c
    torch.testing.assert_close(balanced[0].norm(dim=1), balanced[1].norm(dim=0))
    before = torch.relu(x @ up.T + bias) @ down.T
    torch.testing.assert_close(torch.relu(x @ balanced[0].T + c * bias) @ balanced[1].T, before)
    assert sum(m.square().sum() for m in balanced) < sum(m.square().sum() for m in (up, down))
