"""Counts and bytes from shapes against those of real models, real optimisers and real steps."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from peftcli.config import frozen
from peftcli.config.catalog import settings_class
from peftcli.config.errors import CheckFailed, UserError
from peftcli.config.schema import (
    ClassificationConfig,
    DataConfig,
    GenerationConfig,
    LaunchConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)
from peftcli.methods import registry
from peftcli.models import loading
from peftcli.models.precision import autocast
from peftcli.tasks import registry as tasks
from peftcli.training import ledger, optimiser, out_of_memory, prepare
from peftcli.training.casting import left_to_autocast
from peftcli.training.estimate import count, estimate
from peftcli.training.ledger import Ledger
from peftcli.training.shadow import Shadow
from peftcli.training.workload import Shape, Workload
from tests import few_shot, pictures
from tests.methods.test_peft_tuners import ARGS, TARGETS, TYPES

SHAPE = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "pad_token_id": 0,
}  # fmt: skip
ROWS, LENGTH, LEARNT = 3, 40, 30
NEED_WEIGHTS = {"ADAMSS", "FROD", "SHIRA"}
"""Tuners that cluster, decompose or pick from the weights as they go in."""


def make(name: str = "lora", task=None, training=None, **settings) -> RunConfig:
    return RunConfig(
        model=ModelConfig(name="tiny", weights="random", shape=SHAPE),
        data=DataConfig(source="files", files={"train": "none.jsonl"}),
        method=settings_class(name)(**settings),
        task=task or GenerationConfig(max_length=LENGTH),
        training=replace(TrainingConfig(precision="fp32", batch_size=ROWS), **(training or {})),
        launch=LaunchConfig(device="cpu"),
    )


def work(config: RunConfig, accumulates: bool = False) -> Workload:
    task = tasks.build(config.task)
    if task.architecture == "sequence-classification":
        task.labels = ["a", "b", "c"]
    shape = Shape(ROWS, LENGTH, ROWS if task.architecture == "sequence-classification" else LEARNT)
    return Workload(task, shape, None, None, accumulates, 10)


def real(config: RunConfig, precision: str = "fp32"):
    """The same on real tensors: the base, the attached model, its method and a batch."""
    found = work(config)
    loaded = loading.load(config.model, precision, found.task.architecture, found.task.labels)
    before = {id(p): p for p in loaded.model.parameters()}
    method = registry.find(config.method.name)(config.method)
    model = method.attach(loaded.model, loaded.family)
    for stage in method.stages(10):
        if stage.start:
            stage.start(model)
    ids = torch.randint(1, 300, (ROWS, LENGTH))
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[1, 30:] = 0
    labels = torch.full((ROWS, LENGTH), -100)
    if found.task.architecture == "sequence-classification":
        labels[:, -1] = 1
    else:
        labels.view(-1)[: LEARNT + 1] = 5  # the first position of a row has nothing before it
    return found, before, model, method, {"input_ids": ids, "attention_mask": mask, "labels": labels}


METHODS = [
    ("lora", {"r": 4, "targets": ["attention"]}), ("lora", {"r": 4, "init": "pissa"}), ("lora", {"init": "olora"}),
    ("lora", {"init": "mica"}), ("lora", {"use_dora": True}), ("peft", {"type": "LOKR"}), ("peft", {"type": "VERA",
    "args": {"r": 4}, "targets": ["attention.q"]}), ("full", {}),
]  # fmt: skip
NAMED = [f"{name}-{'-'.join(map(str, settings.values()))}" for name, settings in METHODS]


@pytest.mark.parametrize(("name", "settings"), METHODS, ids=NAMED)
def test_counts_are_the_real_models(name: str, settings: dict, tmp_path: Path) -> None:
    config = make(name, **settings)
    found = count(config, work(config))
    _, _, model, method, _ = real(config)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert found.parameters["total"] == sum(p.numel() for p in model.parameters())
    assert found.parameters["trainable"] == sum(p.numel() for p in trained)
    held = found.heaviest[1]
    assert held.gradients == sum(p.nbytes for p in trained)
    assert held.weights == sum(ledger.held_by(loading.load(config.model, "fp32", "causal-lm", None).model).values())
    method.finish(model)
    model.save_pretrained(tmp_path)
    assert found.file_bytes == pytest.approx(next(tmp_path.glob("*.safetensors")).stat().st_size, rel=0.01, abs=100)


def test_optimiser_bytes_are_those_of_its_state() -> None:
    config = make("lora")
    _, _, model, method, _ = real(config)
    built = optimiser.build(config.optim, model, method.parameter_groups(model))
    for group in built.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    built.step()
    state = sum(value.nbytes for entry in built.state.values() for value in entry.values())
    assert count(config, work(config)).heaviest[1].optimiser == state


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "settings", "task"),
    [
        ("lora", {"r": 4}, GenerationConfig()),
        ("full", {}, GenerationConfig()),
        ("linear_probe", {}, ClassificationConfig(head="linear")),
        ("peft", {"type": "IA3"}, GenerationConfig()),
    ],
    ids=["lora", "full", "linear_probe", "ia3"],
)
def test_activations_are_those_of_a_real_step(name, settings, task, precision: str, again: bool) -> None:
    config = make(name, task, {"precision": precision, "gradient_checkpointing": again}, **settings)
    predicted = count(config, work(config)).heaviest[1]
    found, _, model, _, batch = real(config, precision)
    model.train()
    if again:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        base.disable_input_require_grads()  # as in training: the frozen prefix keeps no graph
    book = Ledger([*model.parameters(), *model.buffers(), *batch.values()])
    with book, left_to_autocast(model, precision == "bf16"):
        with autocast(precision, "cpu"):
            loss = found.task.loss(model, batch).total
        kept = book.live
        loss.backward()
    assert predicted.activations == pytest.approx(kept, rel=0.03)
    assert predicted.temporaries >= 0 <= predicted.apart
    held = predicted.activations + predicted.temporaries + predicted.gradients - predicted.apart
    assert held == pytest.approx(book.peak, rel=0.03)


def test_activations_are_what_autograd_saves() -> None:
    """The ledger against PyTorch's own hooks: every saved storage that is no parameter, once."""
    config = make("lora", r=4)
    found, _, model, _, batch = real(config)
    inside = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), *batch.values()]}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in inside:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = found.task.loss(model, batch)
    expected = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    assert loss.weight == LEARNT
    assert count(config, work(config)).heaviest[1].activations == pytest.approx(expected, rel=0.03)


def test_accumulating_keeps_the_gradients_through_the_forward_pass() -> None:
    config = make("full")
    alone, parts = (count(config, work(config, accumulates)).heaviest[1] for accumulates in (False, True))
    assert parts.peak - alone.peak > 0.5 * alone.gradients


def test_recomputing_keeps_less_and_two_processes_average_in_buffers() -> None:
    config = make("lora")
    again = replace(config, training=replace(config.training, gradient_checkpointing=True))
    both = replace(config, launch=replace(config.launch, processes=2))
    first = count(config, work(config))
    assert count(again, work(again)).heaviest[1].activations < 0.5 * first.heaviest[1].activations
    assert count(both, work(both)).heaviest[1].gradients == 2 * first.heaviest[1].gradients
    assert count(both, work(both)).peak > 1.9 * first.heaviest[1].peak


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_of_peft_counts(kind: str) -> None:
    config = make("peft", type=kind, targets=TARGETS.get(kind, []), args=ARGS.get(kind, {}))
    if kind in NEED_WEIGHTS:
        with pytest.raises(UserError, match="looks at the weights"):
            Shadow(config, tasks.build(config.task), "fp32")
        return
    found = count(config, work(config))
    model = real(config)[2]
    assert found.parameters["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.heaviest[1].activations > 0


def test_the_recipes_mistakes_are_said_as_they_are() -> None:
    config = make("linear_probe")
    with pytest.raises(UserError, match="needs a classification head"):
        count(config, work(config))
    config = make("lora", targets=["attention.w"])
    with pytest.raises(CheckFailed, match="dead-target"):
        count(config, work(config))


def test_rows_that_are_here_are_counted(make_run) -> None:
    run = make_run(training={"batch_size": 5, "micro_batch_size": 2, "max_steps": None})
    found = estimate(frozen.load(run.config))
    shape, _ = found.heaviest
    assert (shape.rows, shape.learnt, found.steps) == (2, 2, 8)
    assert found.mean is not None
    assert found.mean[0].length < shape.length < 256
    assert not found.notes


@pytest.mark.parametrize("method", ["smat", "lora"])
def test_few_shot_tasks_are_counted_by_the_largest_that_is_drawn(method: str, tmp_path: Path) -> None:
    places = {name: few_shot.make_domain(tmp_path / name, 9, 6, seed) for seed, name in enumerate("ab")}
    domains = {name: few_shot.domain(place) for name, place in places.items()}
    settings = {"smat": {"experts": 3}, "lora": {"r": 4}}[method]
    run = few_shot.make_run(
        pictures.make_checkpoint(tmp_path / "vit"), domains, tmp_path / "runs", data={"validation_share": 0.0},
        method=settings_class(method)(**settings), training={"micro_batch_size": None},
    )  # fmt: skip
    config = frozen.load(run.config)
    predicted = estimate(config)
    shape, held = predicted.heaviest
    assert (len(shape.parts), shape.length, predicted.steps, held.gradients > 0) == (2, 16, 8, True)
    assert predicted.mean is not None
    assert predicted.mean[0].rows < shape.rows
    assert any(note.startswith("train: ") and "in 2 domains, 16 tasks" in note for note in predicted.notes)

    material = prepare.load_material(config)
    by_size = sorted(range(16), key=lambda i: len((one := material.train.task(i, (0, 0))[1]).support) + len(one.query))
    batch = material.task.collate(material.train.take(by_size[-2:]), material.tokenizer, (0, 0))
    assert len(batch["class"]) == shape.rows
    loaded = loading.load(config.model, "fp32", material.task.architecture, [])
    built = registry.find(method)(config.method)
    model = built.attach(loaded.model, loaded.family)
    for stage in built.stages(8):
        if stage.start:
            stage.start(model)
    model.train()
    book = Ledger([*model.parameters(), *model.buffers(), *batch.values()])
    with book, left_to_autocast(model, False):
        loss = tasks.build(config.task).loss(model, batch).total
        kept = book.live
        loss.backward()
    assert held.activations == pytest.approx(kept, rel=0.03)
    assert held.activations + held.temporaries + held.gradients - held.apart == pytest.approx(book.peak, rel=0.05)


def test_a_probe_of_few_shot_tasks_is_refused() -> None:
    from peftcli.config.compose import compose
    from peftcli.training.probe import probe

    with pytest.raises(UserError, match="few-shot tasks are of many sizes"):
        probe(compose("vit/emoji_smat").config)


def test_a_probe_trains_three_steps_and_leaves_nothing(make_run, tmp_path: Path) -> None:
    from peftcli.training.probe import probe

    run = make_run(training={"batch_size": 10, "max_steps": None, "epochs": 3.0})
    before = sorted(tmp_path.rglob("*"))
    found = probe(frozen.load(run.config))
    assert sorted(tmp_path.rglob("*")) == before
    assert found.steps == 12
    assert 0 < found.loaded_bytes < found.peak_bytes
    assert found.hours == pytest.approx(12 * found.step_seconds / 3600)


@pytest.mark.parametrize("text", ["DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes", ""])
def test_out_of_memory_is_a_check_with_the_cheapest_changes(text: str) -> None:
    error = RuntimeError(text) if text else torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(CheckFailed) as failed, out_of_memory.named(make()):
        raise error
    assert failed.value.check == "out-of-memory"
    assert "training.micro_batch_size=1" in failed.value.hint
    assert "training.gradient_checkpointing=true" in failed.value.hint


def test_a_real_allocation_that_is_too_large_is_caught_and_other_errors_are_not() -> None:
    with pytest.raises(CheckFailed, match="out-of-memory"), out_of_memory.named(make()):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shape"), out_of_memory.named(make()):
        raise RuntimeError("shape mismatch")


def test_changes_not_made_yet_come_first() -> None:
    config = make("full", training={"micro_batch_size": 1, "gradient_checkpointing": True})
    told = [change.overrides for change in out_of_memory.changes(config)]
    assert told == [("training.precision=bf16", "model.dtype=bfloat16"), ("method=lora",)]


@pytest.mark.slow
@pytest.mark.samples
def test_growth_is_within_a_quarter_of_the_measured() -> None:
    script = Path(__file__).parents[2] / "scripts" / "benchmark_estimate.py"
    done = subprocess.run([sys.executable, script, "--json"], capture_output=True, text=True, timeout=1500, check=True)
    for row in json.loads(done.stdout):
        assert abs(row["error"]) < 0.25, row
