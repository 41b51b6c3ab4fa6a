"""The mode `adapter`: bases from data or weights, a trained core between them, and what the report shows of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from peftcli.config.errors import Mistake, UserError
from peftcli.methods import contract
from peftcli.methods.contract import Calibration
from peftcli.methods.injection import inject
from peftcli.methods.peft_types import PeftRow, register
from peftcli.methods.rowcol import bases, convolution, moments
from peftcli.methods.rowcol.bases import Basis
from peftcli.methods.rowcol.config import NAME, RowcolConfig
from peftcli.methods.rowcol.layer import RowcolLayer, check_kind
from peftcli.methods.rowcol.model import RowcolModel
from peftcli.methods.rowcol.settings import Settings
from peftcli.models import roles
from peftcli.models.family import Family

PEFT_TYPE = PeftRow(NAME, RowcolConfig, RowcolModel)
ADAPTER = "default"
NAMED = 3
"""Modules that a note names."""


class Adapter(contract.Method):
    """Trains a core between a basis of each module's column space and one of its row space."""

    settings: Settings
    capabilities = contract.Capabilities(layers=frozenset({"linear", "conv2d"}))

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self._bases: dict[str, Basis] = {}

    def attach(self, model: nn.Module, family: Family, calibration: Calibration | None = None) -> PeftModel:
        """See the contract. On the meta device the bases are shapes alone, as large as they may be.

        Raises:
            UserError: No target has a row space of its own, there is no calibration set where one is needed or it is
                too small, or the budget is.
            CheckFailed: What `moments.visit` and `gradients.visit` say.
        """
        register(PEFT_TYPE)
        settings = self.settings
        names = self._fit(model, roles.resolve(model, family, settings.targets or family.default_targets))
        layers = {name: model.get_submodule(name) for name in names}
        config = RowcolConfig(alpha=settings.alpha, save_dtype=settings.save_dtype)
        counts = {name: bases.most(layer, settings) for name, layer in layers.items()}
        if next(iter(layers.values())).weight.is_meta:
            config.start, config.rank_pattern = "file", counts
            self._note_count(layers)
            return inject(model, config, names)
        owners = _owners(model, names, family)
        self._bases = self._find(model, layers, owners, counts, calibration)
        config.bases, config.rank_pattern = self._bases, self._ranks(model, layers, calibration)
        config.owners = _by_rank(owners, config.rank_pattern)
        wrapped = inject(model, config, names)
        self._note_ranks(config.rank_pattern, counts)
        return wrapped

    def _fit(self, model: nn.Module, names: list[str]) -> list[str]:
        """Those that have a row and a column space; grouped convolutions are left out, and listed."""
        left_out = {
            name: why
            for name in names
            if isinstance(layer := model.get_submodule(name), nn.Conv1d | nn.Conv2d)
            and (why := convolution.cannot(layer))
        }
        if left_out:
            listed = "; ".join(f"{name}: {why}" for name, why in left_out.items())
            if len(left_out) == len(names):
                raise UserError(Mistake(f"rowcol adapts none of the targets. {listed}", "method.targets"))
            self.notes.append(f"left out {len(left_out)} of {len(names)} targets. {listed}")
        kept = [name for name in names if name not in left_out]
        for name in kept:
            check_kind(model.get_submodule(name))
        return kept

    def _find(
        self,
        model: nn.Module,
        layers: dict[str, nn.Module],
        owners: dict[str, str],
        counts: dict[str, int],
        calibration: Calibration | None,
    ) -> dict[str, Basis]:
        settings = self.settings
        if settings.basis == "weight":
            return bases.of_weights(layers, owners, counts)
        if calibration is None:
            what = f"method.basis={settings.basis} looks at a calibration set, and there is none"
            raise UserError(Mistake(what, "method.basis", hint="method.basis=weight"))
        find = bases.of_data if settings.basis == "data" else bases.of_gradients
        return find(model, layers, owners, counts, calibration, settings.calibration_batches)

    def _ranks(self, model: nn.Module, layers: dict[str, nn.Module], calibration: Calibration | None) -> dict[str, int]:
        settings, gains = self.settings, None
        if settings.rank == "auto" and settings.budget is not None and settings.worth == "sensitivity":
            if calibration is None:
                what = "method.worth=sensitivity looks at a calibration set, and there is none"
                raise UserError(Mistake(what, "method.worth", hint="method.worth=energy"))
            gains = bases.sensitivities(model, layers, self._bases, calibration, settings.calibration_batches)
        return bases.ranks(self._bases, settings, gains)

    def _note_count(self, layers: dict[str, nn.Module]) -> None:
        """What shapes alone do not say."""
        settings = self.settings
        if settings.rank == "auto":
            most = f"the most there may be, method.max_rank={settings.max_rank} directions of each module"
            self.notes.append(f"method.rank=auto is counted as {most}: how many there are shows on the real weights")
        if settings.basis == "data":
            held = 8 * min(sum(moments.width(layer) ** 2 for layer in layers.values()), moments.TOGETHER)
            held = max(held, 8 * max(moments.width(layer) ** 2 for layer in layers.values()))
            what = f"second moments of inputs, {held / 1e9:.2f} GB, are held for a moment before the first step"
            self.notes.append(f"method.basis=data: {what}, which is not counted")

    def _note_ranks(self, ranks: dict[str, int], counts: dict[str, int]) -> None:
        settings, low = self.settings, [name for name in ranks if ranks[name] < counts[name]]
        if settings.rank == "auto":
            found, cores = sorted(ranks.values()), sum(rank**2 for rank in ranks.values())
            by = (
                f"method.energy={settings.energy}"
                if settings.energy is not None
                else f"method.budget by {settings.worth}"
            )
            spread = (
                f"{found[0]} to {found[-1]} directions of {len(ranks)} modules, {found[len(found) // 2]} in the middle"
            )
            self.notes.append(f"{spread}, by {by}: {cores:,} numbers in the cores")
        elif low:
            named = ", ".join(f"{name} {ranks[name]}" for name in low[:NAMED]) + (", ..." if len(low) > NAMED else "")
            what = "the calibration rows or the weights use no more directions there"
            self.notes.append(f"fewer than {settings.rank} directions in {len(low)} modules ({named}): {what}")

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The bases: computed anew they may differ in their last bits."""
        return {
            f"{name}.{kind}": getattr(layer, f"rowcol_{kind}")[ADAPTER]
            for name, layer in _layers(model)
            for kind in ("U", "V")
        }

    def restore(self, model: Any, state: dict[str, Tensor]) -> None:
        """See the contract."""
        for name, layer in _layers(model):
            now = layer.rowcol_U[ADAPTER]
            layer.put_bases(ADAPTER, *(state[f"{name}.{kind}"].to(now, copy=True) for kind in ("U", "V")))

    def figures(self, model: Any) -> list[dict[str, Any]]:
        """How much of each module's energy lies in its bases, and their directions."""
        ranks = model.peft_config[ADAPTER].rank_pattern
        shown = [name for name in ranks if name in self._bases]
        if not shown:
            return []
        of = {name: self._bases[name] for name in shown}
        held = [[sum(b.input_shares[: ranks[n]]) for n, b in of.items()]]
        held += [[sum(b.output_shares[: ranks[n]]) for n, b in of.items()]]
        what = {"data": "inputs and outputs", "weight": "weight", "gradient": "gradient"}[self.settings.basis]
        places = list(range(len(shown)))
        return [
            {
                "title": "Row and column spaces",
                "x": places,
                "y": held,
                "labels": {
                    "x": "adapted module, from input to output",
                    "y": f"share of the energy of its {what}",
                    "series": ["inside the row space's basis", "inside the column space's basis"],
                },
            },
            {"title": "Directions of each module", "x": places, "y": [[ranks[name] for name in shown]],
             "labels": {"x": "adapted module, from input to output", "y": "directions"}},
        ]  # fmt: skip


def _owners(model: nn.Module, names: list[str], family: Family) -> dict[str, str]:
    """The first of the modules that read the same input, for each of them."""
    owners: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name in names:
        role = roles.role_of(name, family)
        group = next((place for place, together in enumerate(bases.SHARED) if role in together), None)
        if group is not None:
            key = (name.rpartition(".")[0], group, moments.width(model.get_submodule(name)))
            owners[name] = first.setdefault(key, name)
    return owners


def _by_rank(owners: dict[str, str], ranks: dict[str, int]) -> dict[str, str]:
    """In each group the module of most directions as the owner, without itself: its basis begins with the others'."""
    groups: dict[str, list[str]] = {}
    for name, owner in owners.items():
        groups.setdefault(owner, []).append(name)
    largest = {owner: max(members, key=ranks.__getitem__) for owner, members in groups.items()}
    return {name: largest[owner] for name, owner in owners.items() if largest[owner] != name}


def _layers(model: Any) -> Iterator[tuple[str, RowcolLayer]]:
    """The adapted modules by the names they have in the base."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, RowcolLayer):
            yield name, module
