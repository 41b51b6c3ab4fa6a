"""The mathematics of Kronecker terms in float64: rearrangement, decomposition, products, gradients."""

from __future__ import annotations

import pytest
import torch

from peftcli.methods.kpsvd import maths
from peftcli.methods.kpsvd.decomposition import krylov, leading
from peftcli.methods.kpsvd.shapes import Split

SHAPES = [Split(4, 4, 4, 4), Split(3, 2, 5, 4), Split(8, 2, 2, 3), Split(2, 8, 6, 2), Split(1, 6, 9, 1)]
SHAPES += [Split(12, 1, 1, 10)]


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(split: Split, terms: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return draw(terms, split.m, split.n, seed=seed), draw(terms, split.p, split.q, seed=seed + 1)


def dense(U_KMN: torch.Tensor, V_KPQ: torch.Tensor) -> torch.Tensor:
    return sum(torch.kron(U, V) for U, V in zip(U_KMN, V_KPQ, strict=True))


def literal(W_OI: torch.Tensor, split: Split) -> torch.Tensor:
    """The trap: a plain reshape to m n rows in place of the rearrangement, and all its terms put together again."""
    U, sigma, V = torch.linalg.svd(W_OI.reshape(split.m * split.n, -1), full_matrices=False)
    terms = range(len(sigma))
    return dense(
        torch.stack([sigma[k] * U[:, k].view(split.m, split.n) for k in terms]),
        torch.stack([V[k].view(split.p, split.q) for k in terms]),
    )


@pytest.mark.parametrize("split", SHAPES)
def test_a_product_is_rearranged_to_an_outer_product(split):
    U, V = factors(split, 1)
    R = maths.rearrange(torch.kron(U[0], V[0]), split)
    assert torch.equal(R, torch.outer(U.flatten(), V.flatten()))
    W = draw(split.rows, split.columns)
    assert torch.equal(maths.restore(maths.rearrange(W, split), split), W)
    assert maths.rearrange(W, split).norm() == pytest.approx(W.norm().item(), rel=1e-14)


@pytest.mark.parametrize("split", SHAPES)
def test_all_terms_make_up_the_weight(split):
    W = draw(split.rows, split.columns)
    (found,) = leading([W], split, split.terms)
    again = maths.total(found.U * found.sigma[:, None, None], found.V)
    assert (again - W).norm() / W.norm() < 1e-12
    assert found.sigma.square().sum().item() == pytest.approx(found.energy)
    for factor in (found.U.flatten(1), found.V.flatten(1)):
        torch.testing.assert_close(factor @ factor.T, torch.eye(len(factor), dtype=torch.float64))


def test_without_the_rearrangement_it_is_another_matrix():
    split = Split(4, 4, 4, 4)
    W = draw(16, 16)
    assert (literal(W, split) - W).norm() / W.norm() > 1
    torch.testing.assert_close(literal(W, split), maths.restore(W.view(16, 16), split))


@pytest.mark.parametrize("split", SHAPES[:4])
def test_the_leading_terms_are_the_best_of_their_number(split):
    W = draw(split.rows, split.columns)
    (found,) = leading([W], split, split.terms)
    for terms in (1, 2, 3):
        best = maths.total(found.U[:terms] * found.sigma[:terms, None, None], found.V[:terms])
        error = (W - best).square().sum().item()
        assert error == pytest.approx(found.sigma[terms:].square().sum().item(), rel=1e-10)
        assert min(_alternating(W, split, terms, seed) for seed in range(5)) > error * (1 - 1e-9)


def _alternating(W: torch.Tensor, split: Split, terms: int, seed: int) -> float:
    """Squared error of alternating least squares from a random start."""
    R = maths.rearrange(W, split)
    V = draw(terms, split.p * split.q, seed=seed)
    for _ in range(60):
        U = torch.linalg.lstsq(V.T, R.T).solution.T
        V = torch.linalg.lstsq(U, R).solution
    return (R - U @ V).square().sum().item()


@pytest.mark.parametrize("split", SHAPES)
@pytest.mark.parametrize("lead", [(), (3,), (2, 5)])
@pytest.mark.parametrize("left_first", [True, False, None])
def test_products_through_the_factors(split, lead, left_first):
    U, V = factors(split, 3)
    x, y = draw(*lead, split.columns), draw(*lead, split.rows, seed=4)
    W = dense(U, V)
    rows = x.reshape(-1, split.columns)
    torch.testing.assert_close(maths.apply(rows, U, V, left_first).view(*lead, split.rows), x @ W.T)
    torch.testing.assert_close(maths.apply_transposed(y.reshape(-1, split.rows), U, V).view_as(x), y @ W)
    torch.testing.assert_close(maths.total(U, V), W)
    base = draw(split.rows, split.columns, seed=5)
    torch.testing.assert_close(maths.add(base, U, V, torch.float64), base + W)
    torch.testing.assert_close(maths.add(None, U, V, torch.float64), W)


@pytest.mark.parametrize("split", SHAPES)
@pytest.mark.parametrize("large", [0, 2**40])
def test_gradients_are_those_of_autograd(split, large, monkeypatch):
    monkeypatch.setattr(maths, "LARGE", large)
    U, V = (factor.requires_grad_() for factor in factors(split, 3))
    x, g = draw(7, split.columns), draw(7, split.rows, seed=4)
    expected = torch.autograd.grad((x @ dense(U, V).T * g).sum(), (U, V))
    with torch.no_grad():
        for found in (maths.gradients(g.T @ x, U, V), maths.gradients_through_factors(x, g, U, V)):
            torch.testing.assert_close(found, expected)
        G = maths.rearrange(g.T @ x, split)
    torch.testing.assert_close(expected[0][1].flatten(), (G @ V[1].flatten()).detach())
    torch.testing.assert_close(expected[1][1].flatten(), (G.T @ U[1].flatten()).detach())


def test_a_change_is_zero_at_the_start_and_keeps_its_digits():
    split = Split(3, 4, 5, 2)
    U, V = factors(split, 2)
    assert not maths.total(*maths.change(U, V, U, V)).any()
    assert not maths.add(None, *maths.change(U, V, U, V), torch.float64).any()
    near, low = U + 1e-6 * draw(*U.shape, seed=9), torch.float32
    exact = dense(near, V) - dense(U, V)
    found = maths.total(*maths.change(near.to(low), V.to(low), U.to(low), V.to(low)))
    plain = dense(near.to(low), V.to(low)) - dense(U.to(low), V.to(low))
    assert (found - exact).norm() < 0.5 * (plain - exact).norm()


@pytest.mark.parametrize("split", [Split(24, 24, 24, 24), Split(32, 1, 1, 600)])
def test_the_random_start_finds_what_the_exact_svd_finds(split):
    W = draw(split.rows, split.columns)
    R = maths.rearrange(W, split)
    exact = torch.linalg.svdvals(R)
    (found,) = leading([W], split, 4)
    assert found.sigma.square().sum() > 0.98 * exact[:4].square().sum()
    assert (found.sigma <= exact[:4] * (1 + 1e-9)).all()
    (closer,) = leading([W], split, 4, iterations=40)
    torch.testing.assert_close(closer.sigma, exact[:4], rtol=1e-8, atol=0)
    best = maths.total(closer.U * closer.sigma[:, None, None], closer.V)
    assert (W - best).square().sum().item() == pytest.approx(exact[4:].square().sum().item(), rel=1e-8)


def test_weights_come_out_alike_alone_and_together():
    split = Split(6, 6, 6, 6)
    weights = [draw(36, 36, seed=seed) for seed in range(3)]
    for together, W in zip(leading(weights, split, 2), weights, strict=True):
        (alone,) = leading([W], split, 2)
        torch.testing.assert_close(together.U, alone.U)
        torch.testing.assert_close(together.sigma, alone.sigma)


def test_signs_follow_a_convention():
    split = Split(4, 3, 3, 4)
    (found,) = leading([draw(12, 12)], split, 5)
    (turned,) = leading([-draw(12, 12)], split, 5)
    largest = found.U.flatten(1).gather(1, found.U.flatten(1).abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    torch.testing.assert_close(turned.U, found.U)
    torch.testing.assert_close(turned.V, -found.V)


def test_equal_singular_values_give_one_answer():
    eye = torch.eye(16, dtype=torch.float64)
    first, second = (leading([eye], Split(4, 4, 4, 4), 3)[0] for _ in range(2))
    assert torch.equal(first.U, second.U)
    assert torch.equal(first.V, second.V)
    triples = krylov(torch.eye(300, dtype=torch.float64)[None], 10, 4, 0)
    assert all(torch.isfinite(part).all() for part in triples)


def test_column_and_row_factors_are_those_of_the_svd():
    W = draw(9, 7)
    (found,) = leading([W], Split(9, 1, 1, 7), 7)
    U, sigma, V = torch.linalg.svd(W, full_matrices=False)
    signs = (found.U.view(7, 9) * U.T).sum(1).sign()
    torch.testing.assert_close(found.sigma, sigma)
    torch.testing.assert_close(found.U.view(7, 9), signs[:, None] * U.T)
    torch.testing.assert_close(found.V.view(7, 7), signs[:, None] * V)
