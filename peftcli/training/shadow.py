"""A run's model as shapes: the base and its adapter on the meta device, then a training step on fake tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from peftcli.config.errors import Mistake, UserError
from peftcli.config.schema import RunConfig
from peftcli.methods import registry as methods
from peftcli.methods.contract import Method
from peftcli.models import loading, precision
from peftcli.models.loading import LoadedModel
from peftcli.tasks.contract import Task
from peftcli.training import ledger
from peftcli.training.casting import left_to_autocast
from peftcli.training.ledger import Ledger
from peftcli.training.workload import Shape

WITHOUT_VALUES = (RuntimeError, NotImplementedError)
"""What comes of asking a tensor without contents for them."""


class Shadow:
    """A model of the meta device with the method's adapter in it.

    Args:
        config: The run.
        task: Says what stands on top of the model.
        chosen: The precision, `fp32`, `bf16` or `fp16`.

    Attributes:
        loaded: The base.
        model: With the adapter.
        method: Its method.
        base_bytes: Of the base as it is loaded, by type.
        beside_bytes: What attaching adds to it, also outside of the model's own tensors.

    Raises:
        UserError: Model and method do not go together, or the method has to see the weights.
        CheckFailed: `dead-target`.
    """

    def __init__(self, config: RunConfig, task: Task, chosen: str):
        self.config, self.task, self.precision = config, task, chosen
        self.loaded, self.method, self.model = self._attach()

    def _attach(self) -> tuple[LoadedModel, Method, nn.Module]:
        # Most tuners draw on the CPU and move to the base's device; some mix what they make with the base's weights.
        first: Exception | None = None
        places: tuple[AbstractContextManager, ...] = (nullcontext(), torch.device("meta"))
        for place in places:
            task, settings = self.task, self.config.method
            loaded = loading.load(
                self.config.model, self.precision, task.architecture, task.labels, meta=True, image_size=task.image_size
            )
            method = methods.find(settings.name)(settings)
            book = Ledger([*loaded.model.parameters(), *loaded.model.buffers()])
            self.base_bytes = ledger.held_by(loaded.model)
            try:
                with place, book:
                    model = method.attach(loaded.model, loaded.family)
            except (*WITHOUT_VALUES, UserError) as error:
                if isinstance(error, UserError) and not isinstance(error.__cause__, WITHOUT_VALUES):
                    raise
                first = first or error
                continue
            self.beside_bytes = sum(ledger.held_by(model).values()) - sum(self.base_bytes.values()) + book.beyond(model)
            return loaded, method, model
        what = f"method={settings.name} looks at the weights as it goes in, so it cannot be counted without them"
        raise UserError(Mistake(what, hint="peft estimate --probe measures it on the real model")) from first

    def start_stages(self, steps: int) -> None:
        """Come to the last stage, which trains most."""
        for stage in self.method.stages(steps):
            if stage.start:
                stage.start(self.model)

    def modules(self) -> list[nn.Module]:
        """The model, and what its method computes with beside it."""
        return [self.model, *self.method.beside()]

    def trained(self) -> list[nn.Parameter]:
        """The trained tensors."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def as_in_training(self) -> None:
        """Make the model compute as in the loop: in training mode, and again in the backward pass if the run asks."""
        self.model.train()
        if self.config.training.gradient_checkpointing:
            # Random states have contents; they take a few kB.
            self.loaded.model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
            self.loaded.model.disable_input_require_grads()

    def step(self, shape: Shape, accumulates: bool, device: str) -> tuple[int, int]:
        """A forward and a backward pass, within `ledger.pretending`.

        Returns:
            Bytes kept from the forward for the backward pass, and the most bytes held beside the model's tensors.
        """
        batch, book = self._batch(shape, device)
        trained = self.trained()
        with book, left_to_autocast(self.model, self.precision != "fp32"):
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter) if accumulates else None
            before = book.live
            loss = self._loss(batch, device, learns=True)
            kept = book.live - before
            if trained:
                loss.backward()
            del loss
        for parameter in trained:
            parameter.grad = None
        return kept, book.peak

    def measure(self, shape: Shape, device: str) -> int:
        """The most bytes held beside the model's tensors where nothing is trained."""
        batch, book = self._batch(shape, device)
        self.model.eval()
        with book, torch.no_grad(), left_to_autocast(self.model, self.precision != "fp32"):
            self._loss(batch, device)
        self.model.train()
        return book.peak

    def _loss(self, batch: dict[str, torch.Tensor], device: str, learns: bool = False) -> torch.Tensor:
        """As the loop computes it."""
        with precision.autocast(self.precision, device):
            total = self.task.loss(self.model, batch).total
            return self.method.batch_loss(self.model, batch, total) if learns else total

    def _batch(self, shape: Shape, device: str) -> tuple[dict[str, torch.Tensor], Ledger]:
        batch = self.task.blank(shape.rows, shape.length, device, shape.parts)
        tensors = (t for m in self.modules() for t in (*m.parameters(), *m.buffers()))
        here: list[Any] = [*tensors, *batch.values()]
        return batch, Ledger(here, chosen=shape.learnt)
