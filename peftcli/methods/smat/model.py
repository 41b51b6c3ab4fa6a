"""SMAT as a tuner of PEFT: `PeftModel.from_pretrained` loads it, and `for_support` gives a task its weights.

    with model.for_support(inputs, classes, ways):
        features = model(**query).logits

N rows, C classes, D features, K mask entries, M experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.stateless import _reparametrize_module

from peftcli.config.errors import Mistake, UserError
from peftcli.methods.episodes import Episode, in_parts, prototypes, scores, wide
from peftcli.methods.smat import maths, training
from peftcli.methods.smat.config import SmatConfig
from peftcli.methods.smat.layer import SmatLayer
from peftcli.models.features import width

PLACE = "smat"
"""Name of our module in the base."""


class SmatModel(BaseTuner):
    """A model whose weights depend on the task.

    Attributes:
        experts: Weights of the experts in the last task, [M]; None before the first.
        seen: Numbers of the last task in training, for the log.
    """

    prefix = "smat_"
    tuner_layer_cls: Any = SmatLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - as PEFT has it

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put the adapter's tensors beside the model's layers, of which none is replaced."""
        config: Any = self.peft_config[adapter_name]  # SmatConfig
        state = getattr(model, PLACE, None)
        if state is not None:
            raise ValueError("SMAT is one adapter of a model: a second one would have other experts for the same tasks")
        state = SmatLayer()
        state.update_layer(adapter_name, config, model, width(model))
        state.set_adapter([adapter_name], inference_mode=config.inference_mode)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        setattr(model, PLACE, state)
        self.experts: Tensor | None = None
        self.seen: dict[str, float] = {}
        self._current: dict[str, Tensor] | None = None

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("SMAT puts its tensors beside the layers and replaces none")

    @property
    def state(self) -> SmatLayer:
        """Our tensors."""
        return self.model.smat

    @property
    def _name(self) -> str:
        (name,) = self.active_adapters
        return name

    @property
    def settings(self) -> SmatConfig:
        """The configuration."""
        return self.peft_config[self._name]  # type: ignore[return-value]

    def weights(self) -> dict[str, Tensor]:
        """The base's own weights that tasks change, by name."""
        own = dict(self.model.named_parameters())
        return {name: own[name] for name in self.state.layouts[self._name].shapes}

    def masks(self) -> Tensor:
        """The experts' masks [K, M]."""
        return self.state.masks(self._name)

    def counts(self) -> Tensor:
        """How many weights each mask entry covers, [K]."""
        return self.state.counts(self._name)

    def route(self, base_ND: Tensor, classes_N: Tensor, ways: int, draw: bool = False) -> tuple[Tensor, Tensor]:
        """Weights of the experts for a task, and the router's logits, [M] each.

        Args:
            base_ND: The base's features of the support.
            classes_N: The support's classes.
            ways: C.
            draw: Draw the weights, as in training.
        """
        logits_M = self.state.smat_router[self._name](prototypes(wide(base_ND), classes_N, ways))
        noise_M = torch.rand_like(logits_M).clamp(maths.TINY, 1 - maths.TINY) if draw else None
        return maths.mixture(logits_M, self.settings.router_temperature, noise_M), logits_M

    def base_features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Features by the untouched base, without gradients or dropout."""
        awake = [module for module in self.model.modules() if module.training]
        for module in awake:
            module.training = False
        try:
            with torch.no_grad():
                return wide(self.model(**inputs).logits)
        finally:
            for module in awake:
                module.training = True

    def features(self, inputs: Mapping[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
        """Features [N, D] under given weights."""
        return wide(functional_call(self.model, weights, kwargs=dict(inputs)).logits)

    def task_weights(self, inputs: Mapping[str, Tensor], classes_N: Tensor, ways: int) -> dict[str, Tensor]:
        """The weights for a support set, by name; at least float32."""
        base_ND = in_parts(self.base_features, inputs)
        self.experts, _ = self.route(base_ND, classes_N, ways)
        return self.state.task_weights(self._name, self.weights(), self.masks() @ self.experts)

    def chosen(self) -> dict[str, list[float]]:
        """Of the last task: `weights` of the experts, and `density`, the share of the weights that each changes."""
        assert self.experts is not None, "a task comes first"
        density_M = 1 - maths.sparsity(self.masks(), self.counts())
        return {"weights": self.experts.tolist(), "density": density_M.tolist()}

    @contextmanager
    def for_support(self, inputs: Mapping[str, Tensor], classes_N: Tensor, ways: int) -> Iterator[None]:
        """Within it the model has the weights of the task with this support; switched off, those of the base.

        Args:
            inputs: The model's, of the support rows.
            classes_N: Class of each, 0 to C - 1.
            ways: C; each class has a row.
        """
        if self.state.disable_adapters:
            yield
            return
        before, self._current = self._current, self.task_weights(inputs, classes_N, ways)
        try:
            yield
        finally:
            self._current = before

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if self.state.disable_adapters:
            yield
            return
        if self._current is None:
            what = "a SMAT model has weights only for a task, and none was given"
            raise UserError(Mistake(what, hint="with model.for_support(inputs, classes, ways): ... gives it one"))
        # What `functional_call` does, around a call that is PEFT's.
        with _reparametrize_module(self.model, self._current, tie_weights=True):
            yield

    def episode_loss(self, episode: Episode) -> Tensor:
        """The loss of a task in training, a scalar; section 1.4 of the README."""
        settings, state = self.settings, self.state
        inputs, classes_N = episode.part(query=False)
        asked, truth_N = episode.part(query=True)
        kept_ND = episode.base_ND
        base_ND = self.base_features(inputs) if kept_ND is None else kept_ND[: episode.support]
        weights_M, logits_M = self.route(base_ND, classes_N, episode.ways, draw=self.training)
        masks_KM = state.masks(self._name, stochastic=settings.stochastic and self.training)
        theta = state.task_weights(self._name, self.weights(), masks_KM @ weights_M)
        moved, heads_CD = training.after_support(
            self.features, theta, inputs, classes_N, episode.ways, settings.inner_lr
        )
        query_ND = self.features(asked, moved)
        query_NC = scores(query_ND, heads_CD)
        loss = nn.functional.cross_entropy(query_NC, truth_N)
        self.seen = {"query_loss": float(loss.detach())}
        teachers = self._teachers(episode, query_ND, moved, heads_CD, base_ND)
        share = settings.distillation if teachers else 0.0
        taught = maths.distillation(query_NC, teachers, settings.temperature, settings.reverse)
        self.experts = weights_M.detach()
        return (1 - share) * loss + share * taught + self._constraints(masks_KM, logits_M)

    def _teachers(
        self, episode: Episode, query_ND: Tensor, theta: dict[str, Tensor], heads_CD: Tensor, base_ND: Tensor
    ) -> list[Tensor]:
        """Scores of the query by each teacher, [N, C]."""
        settings, (asked, truth_N) = self.settings, episode.part(query=True)
        found = []
        if settings.distillation and settings.teacher_steps:
            how = (settings.teacher_steps, settings.teacher_lr)
            found.append(training.dense_teacher(self.features, query_ND, theta, heads_CD, asked, truth_N, *how))
        if settings.distillation and settings.base_teacher:
            kept_ND = episode.base_ND
            query_ND = self.base_features(asked) if kept_ND is None else kept_ND[episode.support :]
            means_CD = prototypes(base_ND, episode.part(query=False)[1], episode.ways)
            found.append(scores(query_ND, means_CD))
        return found

    def _constraints(self, masks_KM: Tensor, logits_M: Tensor) -> Tensor:
        settings, counts_K = self.settings, self.counts()
        multipliers_M = self.state.smat_multipliers[self._name]
        density_M = maths.expected_density(self.state.smat_logits[self._name], counts_K)
        sparsity_M = maths.sparsity(masks_KM.detach(), counts_K)
        lower = maths.primal(multipliers_M, density_M, settings.sparsity)
        raised = maths.dual(multipliers_M, sparsity_M, settings.sparsity)
        return lower + raised + LOGIT_PENALTY * logits_M.square().mean()

    def merge_for(self, inputs: Mapping[str, Tensor], classes_N: Tensor, ways: int) -> nn.Module:
        """The plain model of a task, in the base's own types; this one is used up. Arguments as `for_support`."""
        with torch.no_grad():
            for name, tensor in self.task_weights(inputs, classes_N, ways).items():
                own = self.model.get_parameter(name)
                own.copy_(tensor)
        return self.unload()

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refused: there is a merged model for each task, and none for all.

        Raises:
            ValueError: Always.
        """
        raise ValueError("each task has its own merged model: give it --support FOLDER")

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As `merge_and_unload`."""
        self.merge_and_unload()

    def unload(self) -> nn.Module:
        """The base as it was."""
        delattr(self.model, PLACE)
        del self.model.peft_config
        return self.model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        parts = key.split(".")
        at = next((i for i, part in enumerate(parts) if part.startswith(cls.prefix)), None)
        if at is None or parts[at + 1 : at + 2] != [adapter_name]:
            return key
        return ".".join([*parts[: at + 1], *parts[at + 2 :]])


LOGIT_PENALTY = 1e-4
"""Weight of the router's squared logits in the loss."""
