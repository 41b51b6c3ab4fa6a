"""The two bases of each module, where they come from, and how many of their directions it gets.

Letters: O outputs, I inputs, M directions that are looked at, K of them that are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftcli.config.errors import Mistake, UserError
from peftcli.methods import gradients
from peftcli.methods.contract import Calibration
from peftcli.methods.rowcol import budget, maths, moments
from peftcli.methods.rowcol.settings import Settings
from peftcli.models import packed

SHARED = (frozenset({"attention.q", "attention.k", "attention.v"}), frozenset({"mlp.up", "mlp.gate"}))
"""Roles of one part of a block that read the same input: their row spaces get one basis."""
THERE = 1e-9
"""A direction with less than this share of the first one's energy is rounding."""


@dataclass(frozen=True)
class Basis:
    """The leading directions of a module's two spaces.

    Attributes:
        columns: U [O, M], orthonormal.
        rows: V [I, M], orthonormal.
        output_shares: Share of the outputs' energy in each direction [M], falling.
        input_shares: The same of the inputs.
        positions: How many positions of data they come from; None where they come from a matrix.
    """

    columns: Tensor
    rows: Tensor
    output_shares: list[float]
    input_shares: list[float]
    positions: int | None = None

    @property
    def there(self) -> int:
        """Directions that both sides have; at least 1."""
        counts = [sum(one > THERE * shares[0] for one in shares) for shares in (self.output_shares, self.input_shares)]
        return max(1, min(counts))


def most(layer: nn.Module, settings: Settings) -> int:
    """M, the most directions that a module can get."""
    asked = settings.max_rank if settings.rank == "auto" else settings.rank
    shape = packed.shape(layer)
    return min(asked, shape[0], shape[1:].numel())


def of_weights(
    layers: Mapping[str, nn.Module], owners: Mapping[str, str], counts: Mapping[str, int]
) -> dict[str, Basis]:
    """Bases of the weights alone."""
    return _of_matrices(packed.Weights(layers), owners, counts)


def of_gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    owners: Mapping[str, str],
    counts: Mapping[str, int],
    calibration: Calibration,
    batches: int,
) -> dict[str, Basis]:
    """Bases of the weights' mean gradient on calibration rows: the directions that a first step would go."""
    found = gradients.mean(model, gradients.watched(model, layers), calibration, batches)
    return _of_matrices(found, owners, counts)


def of_data(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    owners: Mapping[str, str],
    counts: Mapping[str, int],
    calibration: Calibration,
    batches: int,
) -> dict[str, Basis]:
    """Bases of what goes into modules and what they put out on calibration rows."""
    found: dict[str, Basis] = {}
    first = {name: layer for name, layer in layers.items() if owners.get(name, name) == name}
    for owner, moment in moments.visit(model, first, calibration, batches):
        members = [name for name in layers if owners.get(name, name) == owner]
        C_II = moment.mean
        V_IM, into_M = maths.input_basis(C_II, max(counts[name] for name in members))
        for name in members:
            W_OI = maths.wide(packed.weight(layers[name])).flatten(1)
            U_OM, out_M = maths.output_basis(W_OI, C_II, counts[name])
            whole = float(((W_OI @ C_II) * W_OI).sum())
            rows_IM, into = V_IM[:, : counts[name]], _shares(into_M, float(C_II.trace()))[: counts[name]]
            found[name] = Basis(U_OM, rows_IM, _shares(out_M, whole), into, moment.positions)
    return {name: found[name] for name in layers}


def _of_matrices(
    matrices: Mapping[str, Tensor], owners: Mapping[str, str], counts: Mapping[str, int]
) -> dict[str, Basis]:
    groups: dict[str, list[str]] = {}
    for name in matrices:
        groups.setdefault(owners.get(name, name), []).append(name)
    found = {}
    for members in groups.values():
        stack_SI = torch.cat([maths.wide(matrices[name]).flatten(1) for name in members])
        _, into_M, V_IM = maths.leading(stack_SI, max(counts[name] for name in members))
        into = _shares(into_M.square(), float(stack_SI.square().sum()))
        for name in members:
            W_OI = maths.wide(matrices[name]).flatten(1)
            U_OM, sigma_M, _ = maths.leading(W_OI, counts[name])
            out = _shares(sigma_M.square(), float(W_OI.square().sum()))
            found[name] = Basis(U_OM, V_IM[:, : counts[name]], out, into[: counts[name]])
    return {name: found[name] for name in matrices}


def _shares(energy_M: Tensor, whole: float) -> list[float]:
    return (energy_M.clamp_min(0) / (whole or 1.0)).tolist()  # type: ignore[no-any-return]


def sensitivities(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    found: Mapping[str, Basis],
    calibration: Calibration,
    batches: int,
) -> dict[str, list[float]]:
    """What the first step gains with a core of each size: |Uᵀ G V|² over its leading K x K numbers, K = 1 to M.

    To first order, gradient descent on a core lowers the loss by its squared gradient, and that is Uᵀ G V with G the
    mean gradient of the weight.
    """
    sums = {name: torch.zeros(len(of.input_shares), len(of.input_shares)).double() for name, of in found.items()}

    def add(name: str, G: Tensor) -> None:
        basis = found[name]
        sums[name] += (basis.columns.mT @ maths.wide(G).flatten(1) @ basis.rows).cpu()

    _, count = gradients.visit(model, gradients.watched(model, layers), calibration, batches, add)
    # Entry [K, K] of the two running sums is the sum over the leading K x K.
    return {name: (total / count).square().cumsum(0).cumsum(1).diagonal().tolist() for name, total in sums.items()}


def ranks(
    found: Mapping[str, Basis], settings: Settings, gains: Mapping[str, Sequence[float]] | None = None
) -> dict[str, int]:
    """K of each module.

    Args:
        found: Its directions.
        settings: `rank`, and with auto `energy` or `budget`.
        gains: With `budget`, what a core of each size is worth; None counts the energy on both sides.

    Raises:
        UserError: Fewer positions were seen than directions are asked for, or the budget is too small.
    """
    _check_positions(found, settings)
    there = {name: basis.there for name, basis in found.items()}
    if settings.rank != "auto":
        return {name: min(settings.rank, there[name]) for name in found}
    least = {name: min(settings.min_rank, there[name]) for name in found}
    if settings.energy is not None:
        both = {
            name: [maths.rank_for(shares, settings.energy, 1.0) for shares in (basis.output_shares, basis.input_shares)]
            for name, basis in found.items()
        }
        return {name: max(least[name], min(*of, there[name])) for name, of in both.items()}
    assert settings.budget is not None
    options = {
        name: [
            budget.Option(rank, rank**2, gain)
            for rank, gain in enumerate(_worth(basis, gains[name] if gains else None), start=1)
            if least[name] <= rank <= there[name]
        ]
        for name, basis in found.items()
    }
    return {name: int(one.rank or 0) for name, one in budget.allocate(options, settings.budget).items()}


def _check_positions(found: Mapping[str, Basis], settings: Settings) -> None:
    for name, basis in found.items():
        wanted = min(settings.min_rank if settings.rank == "auto" else settings.rank, len(basis.input_shares))
        if basis.positions is not None and basis.positions < wanted:
            what = f"{basis.positions} positions of the calibration rows cannot show {wanted} directions of {name}"
            hint = "more method.calibration_batches, a lower method.rank, or method.basis=weight"
            raise UserError(Mistake(what, "method.calibration_batches", hint=hint))


def _worth(basis: Basis, gains: Sequence[float] | None) -> Sequence[float]:
    if gains is not None:
        return gains
    pairs = zip(basis.output_shares, basis.input_shares, strict=True)
    return torch.tensor([sum(pair) / 2 for pair in pairs], dtype=torch.float64).cumsum(0).tolist()
