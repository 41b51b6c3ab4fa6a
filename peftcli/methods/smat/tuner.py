"""SMAT in the loop: what is trained by which optimiser, the masks held to their sparsity, then fixed."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from peftcli.config.errors import Mistake, UserError
from peftcli.methods import contract
from peftcli.methods.contract import Calibration, Candidate, Capabilities, Stage
from peftcli.methods.injection import inject
from peftcli.methods.peft_types import PeftRow, register
from peftcli.methods.smat import figures, maths
from peftcli.methods.smat.config import NAME, SmatConfig
from peftcli.methods.smat.masks import weights_of
from peftcli.methods.smat.model import SmatModel
from peftcli.methods.smat.settings import Settings
from peftcli.models import batch_norm, packed, roles
from peftcli.models.family import Family

PEFT_TYPE = PeftRow(NAME, SmatConfig, SmatModel)
ADAPTER = "default"
MASK_STEPS, MULTIPLIER_STEPS = 300.0, 15.0
"""Rates of masks and multipliers times the run's length and over its experts: four times and five times those of the
released code (1e6 over 22 million weights, and 0.002, at its 12,500 steps of 8 experts), with which experts are still a
quarter to a third short of their sparsity at the end of a run of a hundred steps."""
CLIP = {"masks": 5.0, "router": 1.0}
"""Largest gradient norms, as in the released code."""
LAST_RATE = 1 / 3
"""Of the learning rate, once masks are fixed."""


class Method(contract.Method):
    """Meta-trains a shared change, sparse masks over it and a router; each task gets weights of its own."""

    capabilities = Capabilities(
        merges=False, several_adapters=False, recomputes=False, identity_at_start=False, wrapped=False,
        whole_base="it makes weights of its own for each task out of the base's; take launch.strategy=ddp",
        layers=frozenset({"linear", "conv2d", "ssm"}),
    )  # fmt: skip
    settings: Settings

    def __init__(self, settings: Settings):
        super().__init__([settings, *settings.candidates()][-1])
        self._open = settings.candidates()
        self.experts, self.sparsity = self.settings.numbers()
        self._total, self._seen, self._stage = 1, 0, ""
        self._path: list[list[float]] = []
        self._family: Family | None = None

    def candidates(self) -> list[Candidate]:
        """Numbers of experts and sparsities, where either is auto."""
        return [Candidate(one, dict(zip(("experts", "sparsity"), one.numbers(), strict=True))) for one in self._open]

    def attach(self, model: nn.Module, family: Family, calibration: Calibration | None = None) -> PeftModel:
        """See the contract.

        Raises:
            CheckFailed: `dead-target`.
            UserError: The model has a head, is in few bits, or its BatchNorm is awake.
        """
        register(PEFT_TYPE)
        settings, self._family = self.settings, family
        _check(model)
        chosen = roles.resolve(model, family, settings.targets) if settings.targets else None
        config = SmatConfig(
            experts=self.experts, sparsity=self.sparsity, structured=settings.structure == "structured",
            stochastic=settings.stochastic, inner_lr=settings.inner_lr, teacher_steps=settings.teacher_steps,
            teacher_lr=settings.teacher_lr, base_teacher=settings.base_teacher, distillation=settings.distillation,
            reverse=settings.divergence == "reverse", temperature=settings.temperature,
            router_temperature=settings.router_temperature[0],
            weights=list(weights_of(model, chosen)) if chosen is not None else None,
        )  # fmt: skip
        wrapped = inject(model, config)
        if self.experts == 1:  # there is nothing to route, and its weight is always 1
            _tuner(wrapped).state.smat_router.requires_grad_(False)
            self.notes.append("one expert: its weight is 1 for every task, and the router is not trained")
        return wrapped

    def stages(self, total_steps: int) -> list[Stage]:
        """With masks that learn, and then with fixed ones."""
        self._total = total_steps
        last = min(total_steps - 1, round(self.settings.settle * total_steps))
        plan = [Stage("meta", total_steps - last, self._start_meta)]
        return [*plan, Stage("settled", last, self._start_settled)] if last else plan

    def _start_meta(self, model: Any) -> None:
        self._stage = "meta"

    def _start_settled(self, model: Any) -> None:
        self._stage = "settled"
        self._prune(model)
        state = _tuner(model).state
        state.smat_multipliers[ADAPTER].data.zero_()  # the masks meet their constraints now
        state.smat_logits.requires_grad_(False)
        state.smat_multipliers.requires_grad_(False)

    @torch.no_grad()
    def _prune(self, model: Any) -> None:
        """Bring each expert to its sparsity by rank, where the constraints have not."""
        tuner = _tuner(model)
        logits_KM, counts_K = tuner.state.smat_logits[ADAPTER], tuner.counts()
        if counts_K.is_meta:
            return
        short_M = (self.sparsity - maths.sparsity(tuner.masks(), counts_K)).clamp_min(0)
        if short_M.max() > 0 and self._seen:
            self.notes.append(
                f"{int((short_M > 0).sum())} of {len(short_M)} experts were short of their sparsity by up to "
                f"{float(short_M.max()):.2%} when masks were fixed: their smallest entries were set to zero"
            )
        logits_KM.copy_(maths.pruned(logits_KM.clamp(*maths.LIMITS), counts_K, self.sparsity))

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The change by the recipe's optimiser; masks and multipliers by plain descent, the router by AdamW."""
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        entries = _tuner(model).state.layouts[ADAPTER].entries
        settings, experts = self.settings, self.experts
        mask_lr = MASK_STEPS * experts / self._total if settings.mask_lr == "auto" else settings.mask_lr
        multiplier_lr = settings.multiplier_lr
        multiplier_lr = MULTIPLIER_STEPS * experts / self._total if multiplier_lr == "auto" else multiplier_lr
        scale = LAST_RATE if self._stage == "settled" else 1.0
        rows: dict[str, dict[str, Any]] = {
            "smat_delta": {"lr_scale": scale},
            "smat_logits": {"lr": mask_lr * entries, "optimiser": "sgd", "decays": False, "clip_norm": CLIP["masks"]},
            "smat_multipliers": {"lr": multiplier_lr, "optimiser": "sgd", "decays": False, "clip_norm": None},
            "smat_router": {"lr": settings.router_lr * scale, "clip_norm": CLIP["router"]},
        }
        groups = [{"names": [n for n in names if f".{kind}." in n], **row} for kind, row in rows.items()]
        return [group for group in groups if group["names"]]

    @torch.no_grad()
    def after_step(self, model: Any, step: int) -> None:
        """Masks stay where they can come back, multipliers start anew where they have done their work."""
        self._seen += 1
        tuner = _tuner(model)
        state, counts_K = tuner.state, tuner.counts()
        if self._stage != "settled":
            state.smat_logits[ADAPTER].clamp_(*maths.LIMITS)
        masks_KM = tuner.masks()
        sparsity_M = maths.sparsity(masks_KM, counts_K)
        if self._stage != "settled":
            multipliers_M = state.smat_multipliers[ADAPTER]
            multipliers_M.copy_(maths.restarted(multipliers_M, sparsity_M, self.sparsity))
        self._path.append([*sparsity_M.tolist(), maths.union_sparsity(masks_KM, counts_K)])
        self._cool(model)

    def _cool(self, model: Any) -> None:
        first, last = self.settings.router_temperature
        done = min(1.0, self._seen / max(1, self._total))
        _tuner(model).settings.router_temperature = first + (last - first) * done

    def log(self, model: nn.Module) -> dict[str, float]:
        """Sparsity of the densest expert and of all together, and the query's loss by itself."""
        *experts, union = self._path[-1]
        found = {"sparsity_least": min(experts), "sparsity_mean": sum(experts) / len(experts), "sparsity_union": union}
        return {**found, **_tuner(model).seen}

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The place on the temperature's course, and the sparsity so far."""
        width = self.experts + 1
        return {
            "seen": torch.tensor([self._seen]),
            "path": torch.tensor(self._path, dtype=torch.float64).reshape(-1, width),
        }

    def restore(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """See the contract."""
        self._seen, self._path = int(state["seen"].item()), state["path"].tolist()
        self._cool(model)

    @torch.no_grad()
    def finish(self, model: Any) -> None:
        """Hold every expert to its sparsity, and forget what no expert uses of the change."""
        self._prune(model)
        tuner = _tuner(model)
        if tuner.counts().is_meta:
            return
        used_K = (tuner.masks() != 0).any(1)
        state = tuner.state
        for name, gate in state.layouts[ADAPTER].gates(used_K.to(torch.float32)).items():
            state.delta(ADAPTER, name).mul_(gate)

    def figures(self, model: nn.Module) -> list[dict[str, Any]]:
        """Where experts change the model, how much they share, and how sparsity rose."""
        assert self._family is not None
        return figures.all_of(_tuner(model), self._family, self._path, self.sparsity)


def _tuner(model: Any) -> SmatModel:
    return model.base_model


def _check(model: Any) -> None:
    if packed.kind(model):
        raise UserError(Mistake("SMAT changes the weights themselves, and these are in few bits",
                                hint="model.quantization=null"))  # fmt: skip
    if batch_norm.awake(model):
        raise UserError(Mistake("SMAT mixes weights, and a BatchNorm's statistics cannot be mixed",
                                hint="model.batch_norm=frozen"))  # fmt: skip
