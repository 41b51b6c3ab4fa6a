"""Sparse adapters as a method: modules put in, trained in four stages, pruned to a budget, made small at the end."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from peftcli.config.errors import Mistake, UserError
from peftcli.methods import contract
from peftcli.methods.contract import Calibration, Stage
from peftcli.methods.injection import inject
from peftcli.methods.peft_types import PeftRow, register
from peftcli.methods.sparse_adapter import compaction, forms, maths, places, survival
from peftcli.methods.sparse_adapter.config import NAME, SparseAdapterConfig
from peftcli.methods.sparse_adapter.guard import Guard, live, put_live
from peftcli.methods.sparse_adapter.model import SparseAdapterModel
from peftcli.methods.sparse_adapter.pruning import SCORED, Part, Pruning, parts
from peftcli.methods.sparse_adapter.settings import Settings
from peftcli.models.family import Family

PEFT_TYPE = PeftRow(NAME, SparseAdapterConfig, SparseAdapterModel)
ADAPTER = "default"
CHECKS = 5
"""Measurements along the pruning stage, so that the guard can act before its end."""
PRUNED_UNTIL = 0.8
"""Share of the pruning stage after which the budget is reached and held."""
LAST_RATE = 1 / 3
"""Of the learning rate, in the last stage."""
AUTO = {"unit": 0.5, "weight": 0.8}


class Method(contract.Method):
    """Trains bottleneck modules and a new head, and prunes the modules."""

    settings: Settings

    def __init__(self, settings: Settings):
        super().__init__(settings)
        folds = settings.activation == "linear" and not settings.norm and settings.placement == "sequential"
        kinds = frozenset({"linear", "conv2d", "ssm"})
        self.capabilities = contract.Capabilities(merges=folds, layers=kinds)
        auto = 1 - 1 / settings.wide if settings.wide > 1 else AUTO[settings.structure]
        self.sparsity: float = auto if settings.sparsity == "auto" else settings.sparsity
        self._family: Family | None = None
        self._has_head = False
        self._names: list[str] = []
        self._dense = 0
        self._stage, self._step, self._steps = "", 0, 0
        self._seen, self._total, self._now = 0, 0, 0.0
        self._path: list[tuple[float, float, float]] = []
        self._pruning = Pruning(settings.structure, settings.importance, ADAPTER)
        self._guard = Guard(settings.guard, ADAPTER)
        self._hooks: list[Any] = []

    def attach(self, model: nn.Module, family: Family, calibration: Calibration | None = None) -> PeftModel:
        """See the contract.

        Raises:
            CheckFailed: `dead-target`.
            UserError: What `places.resolve` says, or the budget leaves nothing or less than the floor.
        """
        register(PEFT_TYPE)
        settings, self._family = self.settings, family
        linear = settings.activation == "linear"
        self._names = places.resolve(model, family, settings.targets, settings.placement, linear, settings.last_blocks)
        named = {field.name for field in dataclasses.fields(SparseAdapterConfig)} - {"r"}
        given = {name: value for name, value in vars(settings).items() if name in named}
        wrapped: Any = inject(model, SparseAdapterConfig(r=settings.r * settings.wide, **given), self._names)
        self._has_head = any(".modules_to_save." in name for name, p in wrapped.named_parameters() if p.requires_grad)
        self._dense = compaction.size_of(wrapped, ADAPTER)
        self._check_budget(wrapped)
        return wrapped

    def _check_budget(self, model: Any) -> None:
        sizes = [self._prunable(layer) for _, layer in compaction.layers(model, ADAPTER)]
        things = f"{self.settings.structure}s"
        left = maths.kept(self.sparsity, sum(sizes))
        if left < max(1, self.settings.floor * len(sizes)):
            what = f"method.sparsity={self.sparsity:g} leaves {left} of {sum(sizes):,} {things}"
            floor = f", and method.floor={self.settings.floor} of each of {len(sizes)} modules is more"
            raise UserError(Mistake(what + (floor if left else ""), hint="a lower sparsity, or a larger method.r"))

    def _prunable(self, layer: Any) -> int:
        tensors = layer.tensors(ADAPTER)
        unit = self.settings.structure == "unit"
        return len(layer.units[ADAPTER]) if unit else tensors["down"].numel() + tensors["up"].numel()

    def stages(self, total_steps: int) -> list[Stage]:
        """Head alone, few modules, pruning, what survived; those that have no step are left out."""
        settings = self.settings
        self._total = total_steps
        probe = int(settings.probe * total_steps) if self._has_head else 0
        few, final = (int(share * total_steps) for share in (settings.few, settings.final))
        sparsify = total_steps - probe - few - final
        every = -(-sparsify // CHECKS) if settings.guard is not None and self.sparsity > 0 else None
        plan = (("probe", probe), ("few", few), ("sparsify", sparsify), ("final", final))
        return [
            Stage(
                name,
                steps,
                partial(self._start, name, steps),
                measured=name != "probe",
                every=every if name == "sparsify" else None,
                stops_early=name == "final",
            )
            for name, steps in plan
            if steps > 0
        ]

    def _start(self, name: str, steps: int, model: Any) -> None:
        pruned = self._stage == "sparsify" and self._step > 0
        self._stage, self._step, self._steps = name, 0, steps
        if name == "sparsify":
            self._choose(model)
        if name == "final" and pruned:
            self._settle(model)
        present = [found for found, _ in compaction.layers(model, ADAPTER)]
        trained = set(present)
        if name == "probe":
            trained = set()
        if name == "few" and self.settings.chosen is None:
            assert self._family is not None
            trained = places.last(present, self._family, self.settings.few_blocks)
        for found, layer in compaction.layers(model, ADAPTER):
            for tensor in layer.tensors(ADAPTER).values():
                tensor.requires_grad_(found in trained)
        if name == "sparsify":
            self._guard.remember(model, 0.0)

    def _choose(self, model: Any) -> None:
        """Leave the modules with the highest scores, if that was asked and there has been something to score."""
        scores = self._pruning.modules
        if self.settings.chosen is None or not scores:
            return
        count = maths.amount(self.settings.chosen, len(scores))
        best = set(sorted(scores, key=lambda name: -float(scores[name]))[:count])
        for name, layer in list(compaction.layers(model, ADAPTER)):
            if name not in best:
                layer.remove(ADAPTER)
        self._pruning.modules = {}
        self._settled(model)
        self._check_budget(model)
        self.notes.append(f"kept the {count} of {len(scores)} modules that matter most: {', '.join(sorted(best))}")

    def _settle(self, model: Any) -> None:
        """Come to the budget where the stage ended early, make the modules small, and let zeros stay zero."""
        if self.sparsity > 0:
            level = self._guard.level if self._guard.held else self.sparsity
            self._prune(parts(model, ADAPTER), level, None)
        before = survival.count(model, ADAPTER)
        for _, layer in list(compaction.layers(model, ADAPTER)):
            if not layer.effective(ADAPTER)[2].any():  # what is left of it is a bias that nothing was to keep
                layer.remove(ADAPTER)
        compaction.compact(model, ADAPTER)
        for _, layer in compaction.layers(model, ADAPTER):
            compaction.fix(layer, ADAPTER)
        self._settled(model)
        if not compaction.size_of(model, ADAPTER):
            raise UserError(
                Mistake(
                    "every module has been pruned away: nothing of the adapter is left",
                    hint=f"a lower method.sparsity ({self.sparsity:g}), method.l1 ({self.settings.l1:g}) or "
                    f"method.group ({self.settings.group:g}); for the head alone there is method=linear_probe",
                )
            )
        if self.settings.guard is not None and self.sparsity > 0 and self._guard.reference is None:
            self.notes.append("method.guard had nothing to go by: validation was not measured before pruning began")
        self.notes.append(survival.sentence(model, ADAPTER, before, self._names, self.settings.r * self.settings.wide))

    def _settled(self, model: Any) -> None:
        compaction.note(model, ADAPTER)
        compaction.unwrap(model)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """What a proximal step shrinks gets no weight decay as well; the last stage has a third of the rate."""
        scale = LAST_RATE if self._stage == "final" else 1.0
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        shrunk = self.settings.l1 > 0 or self.settings.group > 0
        marks = tuple(f".sparse_{kind}.{ADAPTER}" for kind in SCORED)
        ours = [name for name in names if shrunk and name.endswith(marks)]
        rows = ({"names": [n for n in names if n not in set(ours)]}, {"names": ours, "decays": False})
        return [{**row, "lr_scale": scale} for row in rows if row["names"]]

    def take_optimiser(self, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        """Look at every step that it takes, before and after."""
        for hook in self._hooks:
            hook.remove()
        found = parts(model, ADAPTER)
        before = optimiser.register_step_pre_hook(lambda *_: self._before(found, optimiser))
        after = optimiser.register_step_post_hook(lambda *_: self._after(found, optimiser))
        self._hooks = [before, after]

    def _before(self, found: list[Part], optimiser: torch.optim.Optimizer) -> None:
        if _overflowed(optimiser):
            return
        if self._stage == "sparsify" and self.sparsity > 0:
            self._pruning.watch(found)
        if self._stage == "few" and self.settings.chosen is not None:
            self._pruning.watch_modules(found)

    def _after(self, found: list[Part], optimiser: torch.optim.Optimizer) -> None:
        if _overflowed(optimiser):
            return
        self._step += 1
        self._seen += 1
        if self._stage != "sparsify" or self._guard.held:
            return
        if self.settings.l1 or self.settings.group:
            self._pruning.proximal(found, optimiser, self.settings.l1, self.settings.group)
        last, every = max(1, round(PRUNED_UNTIL * self._steps)), max(1, round(self._total / 100))
        if self.sparsity > 0 and self._step <= last and (self._step % every == 0 or self._step == last):
            self._prune(found, maths.cubic(self._step, last, 0.0, self.sparsity), optimiser)

    def _prune(self, found: list[Part], sparsity: float, optimiser: torch.optim.Optimizer | None) -> None:
        self._pruning.prune(found, sparsity, self.settings.floor, optimiser)
        self._mark(found, sparsity)

    def _mark(self, found: list[Part], sparsity: float) -> None:
        self._now = sparsity
        zeros = survival.sparsity([part.layer for part in found], ADAPTER, self.settings.structure)
        self._path.append((float(self._seen), sparsity, zeros))

    def measured(self, model: nn.Module, value: float, higher_is_better: bool, rows: int = 0) -> None:
        """Take pruning back where it costs too much."""
        value = value if higher_is_better else -value
        guard = self._guard
        if self._stage in ("probe", "few"):
            guard.reference = value
        if self._stage != "sparsify" or guard.held:
            return
        if (loss := guard.loses(value, rows)) is None:
            guard.remember(model, self._now)
            return
        guard.step_back(model)
        self.notes.append(
            f"at {self._now:.0%} sparsity the validation metric was worse by {loss:.3g} than before pruning "
            f"(method.guard={self.settings.guard:g}): back to {guard.level:.0%}, where it stays"
        )
        self._mark(parts(model, ADAPTER), guard.level)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Units and masks of every module, scores, the guard's copy, the place in the stage."""
        place = torch.tensor([self._step, self._seen], dtype=torch.int64)
        now = torch.tensor([self._now], dtype=torch.float64)
        path = torch.tensor(self._path, dtype=torch.float64).reshape(-1, 3)
        kept: dict[str, Tensor] = {"place": place, "now": now, "path": path, **self._guard.state()}
        for name, layer in compaction.layers(model, ADAPTER):
            kept[f"units/{name}"] = torch.tensor(layer.units[ADAPTER], dtype=torch.int32)
        kept |= {f"score/{key}": tensor for key, tensor in self._pruning.scores.items()}
        kept |= {f"module/{key}": tensor for key, tensor in self._pruning.modules.items()}
        return kept | live(model, ADAPTER)

    def restore(self, model: Any, state: dict[str, Tensor]) -> None:
        """See the contract."""
        device = next(model.parameters()).device
        self._step, self._seen = state["place"].tolist()
        self._now, self._path = state["now"].item(), [tuple(row) for row in state["path"].tolist()]
        self._guard.restore(state, device)
        for name, layer in list(compaction.layers(model, ADAPTER)):
            if (units := state.get(f"units/{name}")) is None:
                layer.remove(ADAPTER)
            elif units.tolist() != (now := layer.units[ADAPTER]):
                layer.resize(ADAPTER, [now.index(unit) for unit in units.tolist()])
        put_live(model, ADAPTER, {key: mask for key, mask in state.items() if key.startswith("live/")})
        self._settled(model)
        for kind, means in (("score/", self._pruning.scores), ("module/", self._pruning.modules)):
            means.clear()
            means |= {k.removeprefix(kind): t.to(device, copy=True) for k, t in state.items() if k.startswith(kind)}

    def finish(self, model: Any) -> None:
        """Make the modules small, and their file with them; on the meta device by as much as the budget says."""
        if next(model.parameters()).is_meta:
            for _, layer in compaction.layers(model, ADAPTER) if self.settings.structure == "unit" else ():
                layer.resize(ADAPTER, list(range(maths.kept(self.sparsity, len(layer.units[ADAPTER])))))
            compaction.fold_gates(model, ADAPTER)
            return
        if self._stage == "sparsify" and self._step > 0:
            self._settle(model)
        compaction.compact(model, ADAPTER)
        compaction.fold_gates(model, ADAPTER)
        self._settled(model)

    def forms(self, model: nn.Module) -> list[contract.Form]:
        """Without modules; with all of their units; with the pruned ones at zero; as they are now."""
        return forms.of(model, ADAPTER, self._names, self.settings.r * self.settings.wide, self.settings.gate)

    def figures(self, model: nn.Module) -> list[dict[str, Any]]:
        """What each module has left, what that saves, and how sparsity rose."""
        r = self.settings.r * self.settings.wide
        return survival.figures(model, ADAPTER, self._names, self._path, r, self._dense)


def _overflowed(optimiser: torch.optim.Optimizer) -> bool:
    """Under fp16's loss scale a fused optimiser is called, and changes nothing, where a gradient is infinite."""
    found = getattr(optimiser, "found_inf", None)
    return found is not None and bool(found.any())
