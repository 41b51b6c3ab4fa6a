"""Few-shot tasks of texts: what a batch is, which tasks are fixed, what is measured, what is kept of the base."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from peftcli.config.errors import CheckFailed
from peftcli.config.schema import DataConfig, DomainConfig, EpisodesConfig
from peftcli.data import sources
from peftcli.data.collate import IGNORE
from peftcli.methods import episodes as few_shot
from peftcli.tasks.contract import Evaluation
from peftcli.tasks.episodes import kept, measure
from peftcli.tasks.episodes.measure import Answered
from peftcli.tasks.episodes.task import EpisodesTask
from tests.few_shot import headless
from tests.tiny import build_llama, make_tokenizer

CONFIG = EpisodesConfig(
    reads="text", ways=(3, 4), support=12, class_support=4, queries=2, episodes=6, validation_episodes=3,
    test_episodes=4, max_length=12,
)  # fmt: skip


@pytest.fixture(scope="module")
def words():
    return make_tokenizer()


@pytest.fixture(scope="module")
def splits(tmp_path_factory) -> sources.Splits:
    folder = tmp_path_factory.mktemp("texts")

    def domain(name: str, classes: int, **more) -> DomainConfig:
        path: Path = folder / f"{name}.csv"
        with path.open("w", newline="") as file:
            rows = [(f"{name} film {c} was {'good ' * (i + 1)}", f"c{c}") for c in range(classes) for i in range(5)]
            csv.writer(file).writerows([("text", "label"), *rows])
        return DomainConfig(source="files", files={"train": str(path)}, **more)

    domains = {"a": domain("a", 10), "b": domain("b", 7), "far": domain("far", 2, held_out=True)}
    config = DataConfig(source="domains", domains=domains, validation_share=0.2, test_share=0.3)
    return sources.load(config, ["text", "label"])


@pytest.fixture
def task(splits) -> EpisodesTask:
    made = EpisodesTask(CONFIG)
    made.fit(splits)
    return made


@pytest.fixture(scope="module")
def model(words):
    from peftcli.models.features import take_off_head

    found = build_llama(len(words), labels=2, dtype=torch.float32)
    found.config.pad_token_id = words.pad_token_id
    take_off_head(found)
    return found.requires_grad_(False)


def test_a_batch_holds_tasks_support_before_query(task, splits, words) -> None:
    pool = task.encode_split(splits.train, words)
    batch = task.collate(pool.take([0, 1]), words, draw=(0, 0))
    assert batch["sizes"].sum() == len(batch["input_ids"]) == len(batch["class"]) == len(batch["place"])
    assert task.weight(batch) == len(batch["labels"]) == 2
    first, second = task.split(batch)
    for one in (first, second):
        (support, classes), (query, truth) = one.part(False), one.part(True)
        assert len(support["input_ids"]) == one.support
        assert set(classes.tolist()) == set(truth.tolist()) == set(range(one.ways))
        assert len(query["input_ids"]) + one.support == len(one.classes_N)
    assert "place" not in first.inputs
    again = task.collate(pool.take([0, 1]), words, draw=(0, 0))
    assert all(torch.equal(value, again[name]) for name, value in batch.items())
    other = task.collate(pool.take([0, 1]), words, draw=(0, 1))
    assert batch["place"].tolist() != other["place"].tolist()


def test_fixed_tasks_are_those_of_the_seed_and_of_every_domain(task, splits, words) -> None:
    pool = task.encode_split(splits.test, words)
    assert len(pool) == 3 * 4
    assert [pool.domain_of(i) for i in (0, 4, 8)] == ["a", "b", "far"]
    assert pool.held_out == {"far"}
    assert len(task.encode_split(splits.validation, words)) == 2 * 3
    later = EpisodesTask(CONFIG).encode_split(splits.test, words)
    seeded = EpisodesTask(replace(CONFIG, seed=1)).encode_split(splits.test, words)
    drawn = [[one.task(i)[1].support.tolist() for i in range(12)] for one in (pool, later, seeded)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_small_domains_are_told_and_leaks_refused(task, splits) -> None:
    assert any("far has 2 classes in test" in note and "task.ways" in note for note in splits.notes)
    leaking = replace(splits, validation=splits.train)
    with pytest.raises(CheckFailed, match=r"is in train and in validation"):
        EpisodesTask(CONFIG).fit(leaking)


def test_the_loss_is_a_sum_over_tasks_and_learns_nothing_where_told(task, splits, words, model) -> None:
    pool = task.encode_split(splits.train, words)
    both = task.collate(pool.take([0, 1]), words, draw=(0, 0))
    single = [task.loss(model, task.collate(pool.take([i]), words, draw=(0, 0))).total.item() for i in (0, 1)]
    found = task.loss(model, both)
    assert found.weight == 2
    assert found.total.item() == pytest.approx(sum(single), rel=1e-5)
    both["labels"].fill_(IGNORE)
    assert (task.loss(model, both).total.item(), task.weight(both)) == (0.0, 0)


def test_measured_by_domain_with_intervals_and_again_the_same(task, splits, words, model) -> None:
    pool = task.encode_split(splits.test, words)
    more = {"batch_size": 4, "device": "cpu", "generate": True}
    found: Evaluation = task.evaluate(model, pool, words, **more)
    assert found == task.evaluate(model, pool, words, **more)
    assert {"accuracy", "loss", "accuracy_a", "accuracy_b", "accuracy_far"} < found.metrics.keys()
    assert found.intervals.keys() == found.metrics.keys() - {"loss"}
    each = [found.metrics[f"accuracy_{name}"] for name in ("a", "b", "far")]
    assert found.metrics["accuracy"] == pytest.approx(sum(each) / 3)
    assert found.metrics["accuracy_in_distribution"] == pytest.approx(sum(each[:2]) / 2)
    assert len(found.examples) == 12
    assert found.examples[9]["input"].startswith("far: ")


def test_intervals_are_of_the_mean_over_tasks() -> None:
    found = [Answered("a", value, 0.0, 0, 1, "") for value in (0.2, 0.4, 0.6, 0.8)]
    metrics, intervals = measure.summary(found, frozenset())
    error = 1.959964 * torch.tensor([0.2, 0.4, 0.6, 0.8]).std().item() / 2
    assert metrics["accuracy"] == pytest.approx(0.5)
    assert intervals["accuracy_a"] == pytest.approx((0.5 - error, 0.5 + error), rel=1e-5)


def test_what_the_base_makes_of_every_row_is_kept(task, splits, words) -> None:
    pool = task.encode_split(splits.train, words)
    computed = []

    class Looks:
        """A model that looks at the base's features."""

        def __init__(self, base):
            self.base = base

        def get_base_model(self):
            return self.base

        def base_features(self, inputs):
            computed.append(len(inputs["input_ids"]))
            return few_shot.wide(self.base(**inputs).logits).detach()

    base = build_llama(len(words), labels=2, dtype=torch.float32)
    from peftcli.models.features import take_off_head

    take_off_head(base)
    base.config.pad_token_id = words.pad_token_id
    first = kept.features(Looks(base), pool.source, lambda rows: task.inputs(rows, words), "these rows")
    assert sum(computed) == len(first) == len(pool.source)
    again = kept.features(Looks(base), pool.source, lambda rows: task.inputs(rows, words), "these rows")
    assert torch.equal(first, again)
    assert sum(computed) == len(first)
    base.model.norm.weight.data.add_(1)
    other = kept.features(Looks(base), pool.source, lambda rows: task.inputs(rows, words), "these rows")
    assert not torch.equal(other, first)


def test_features_of_text_are_means_over_its_tokens() -> None:
    for kind in ("llama", "mamba"):
        base = headless(kind)
        inside = base.model.model if kind == "llama" else base.model.backbone
        hidden_BLD = inside(**base.batch)[0]
        mask_BL = base.batch["attention_mask"].double()
        mean_BD = (hidden_BLD * mask_BL[..., None]).sum(1) / mask_BL.sum(1, keepdim=True)
        torch.testing.assert_close(base.model(**base.batch).logits, mean_BD, rtol=0, atol=1e-12)
