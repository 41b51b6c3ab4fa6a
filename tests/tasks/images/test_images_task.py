"""The picture task: labels, batches, the loss, answers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from peftcli.config.errors import CheckFailed, UserError
from peftcli.config.schema import AugmentConfig, ImageConfig
from peftcli.data.collate import IGNORE
from peftcli.data.rows import Rows
from peftcli.models.image_reader import ImageReader
from peftcli.tasks.images.task import ImagesTask
from peftcli.testing import tiny
from tests import pictures

READER = ImageReader("tiny", 16, 16)


def rows_of(folder, labels=None, **counts) -> Rows:
    pictures.make_folder(folder, counts)
    files = sorted(folder.rglob("*.png"))
    labels = labels or [file.parent.name for file in files]
    return Rows.from_list(
        [
            {"image": {"bytes": file.read_bytes(), "path": file.name}, "label": label, "row": i}
            for i, (file, label) in enumerate(zip(files, labels, strict=True))
        ]
    )


def splits_of(train: Rows, **others: Rows) -> SimpleNamespace:
    return SimpleNamespace(**{"train": train, "validation": None, "test": None, **others})


def ready(folder, **settings) -> tuple[ImagesTask, Rows]:
    rows, task = rows_of(folder, good=6, bad=2), ImagesTask(ImageConfig(**settings))
    task.fit(splits_of(rows))
    return task, rows


def loss_of(task: ImagesTask, batch: dict, base: tiny.Base) -> torch.Tensor:
    return task.loss(base.model, {"pixel_values": batch["pixel_values"].double(), "labels": batch["labels"]}).total


@pytest.fixture
def base() -> tiny.Base:
    base = tiny.vit()
    base.model.classifier = torch.nn.Linear(tiny.WIDTH, 2, dtype=torch.float64)
    return base


def test_one_class_only_cannot_be_learnt(tmp_path) -> None:
    with pytest.raises(CheckFailed, match="label-mismatch: all training rows have one label: good"):
        ImagesTask(ImageConfig()).fit(splits_of(rows_of(tmp_path, good=3)))


def test_a_class_that_only_validation_has_is_named(tmp_path) -> None:
    train = rows_of(tmp_path / "a", good=3, bad=3)
    held_out = rows_of(tmp_path / "b", ["odd", "good"], good=2)
    with pytest.raises(CheckFailed, match=r"validation split that no training row has: 'odd' \(1 rows\)"):
        ImagesTask(ImageConfig()).fit(splits_of(train, validation=held_out))


@pytest.mark.parametrize(("labels", "words"), [(None, "did you mean: bad"), (["a", "bda", "c"], "there are 3")])
def test_what_is_to_be_found_is_one_of_two_labels(tmp_path, labels, words) -> None:
    with pytest.raises(UserError, match=words):
        ImagesTask(ImageConfig(positive="bda")).fit(splits_of(rows_of(tmp_path, labels, good=2, bad=1)))


def test_unusable_pictures_are_left_out_counted_and_named(tmp_path) -> None:
    task, rows = ready(tmp_path)
    table = rows.table.to_pylist()
    table[1]["image"]["bytes"] = b"GIF89a no more"
    encoded = task.encode_split(Rows.from_list(table), READER)
    assert [row["row"] for row in encoded.take(range(7))] == [0, 2, 3, 4, 5, 6, 7]
    assert (encoded.counts["rows"], encoded.counts["dropped"]) == (7, 1)
    assert str(encoded.bad[0]).startswith("row 1 (001.png): picture is ")


def test_a_batch_is_what_the_reader_makes_of_its_pictures(tmp_path) -> None:
    task, rows = ready(tmp_path)
    batch = task.collate(task.encode_split(rows, READER).take([0, 7]), READER)
    expected = READER.normalise(np.stack([READER.fit(pictures.draw(*which)) for which in (("bad", 0), ("good", 5))]))
    assert torch.equal(batch["pixel_values"], expected)
    assert batch["labels"].tolist() == [[1, 0], [0, 1]]
    assert task.weight(batch) == 2


def test_what_is_drawn_depends_on_seed_epoch_and_row_alone(tmp_path) -> None:
    task, rows = ready(tmp_path, augment=AugmentConfig(flip=True, crop=0.3, colour=0.4))
    encoded = task.encode_split(rows, READER)

    def pixels(places: list[int], *draw: int) -> torch.Tensor:
        return task.collate(encoded.take(places), READER, draw or None)["pixel_values"]

    assert torch.equal(pixels([2, 5, 1], 0, 3)[1], pixels([5], 0, 3)[0])
    assert not torch.equal(pixels([5], 0, 4), pixels([5], 0, 3))
    assert not torch.equal(pixels([5], 1, 3), pixels([5], 0, 3))
    plain, _ = ready(tmp_path)
    assert torch.equal(pixels([5]), plain.collate(plain.encode_split(rows, READER).take([5]), READER)["pixel_values"])


def test_crops_are_cut_from_the_picture_itself(tmp_path) -> None:
    task, rows = ready(tmp_path, augment=AugmentConfig(crop=0.01))
    whole = np.zeros((160, 160, 3), np.uint8)
    whole[::2] = 255  # stripes that are grey at 16 pixels: a cut of those would stay so
    task.augment = lambda pixels, draw: pixels[:16, :16]
    table = rows.table.to_pylist()
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(whole).save(file, "PNG")
    table[0]["image"]["bytes"] = file.getvalue()
    encoded = task.encode_split(Rows.from_list(table), READER)
    cut = task._pixels(encoded.take([0])[0], READER, (0, 0))
    assert np.array_equal(cut, whole[:16, :16])


def test_parts_of_a_batch_add_up_and_ignored_rows_count_nothing(tmp_path, base) -> None:
    task, rows = ready(tmp_path, class_weights=True, label_smoothing=0.1)
    taken = task.encode_split(rows, READER).take(range(8))
    whole = task.collate(taken, READER)
    parts = [task.collate(part, READER) for part in (taken[:3], taken[3:])]
    assert loss_of(task, whole, base).item() == pytest.approx(sum(loss_of(task, p, base).item() for p in parts))
    whole["labels"].fill_(IGNORE)
    assert (loss_of(task, whole, base).item(), task.weight(whole)) == (0, 0)


def test_the_loss_is_torchs_with_weights_and_smoothing(tmp_path, base) -> None:
    task, rows = ready(tmp_path, class_weights=True, label_smoothing=0.2)
    batch = task.collate(task.encode_split(rows, READER).take(range(8)), READER)
    logits_BK = base.model(pixel_values=batch["pixel_values"].double()).logits
    weights_K = torch.tensor([8 / 4, 8 / 12], dtype=torch.float64)  # two bad of eight, six good
    smooth_BK = batch["labels"].double() * 0.8 + 0.1
    expected = F.cross_entropy(logits_BK, smooth_BK, weight=weights_K, reduction="sum")
    assert loss_of(task, batch, base).item() == pytest.approx(expected.item())


def test_several_labels_a_picture(tmp_path, base) -> None:
    labels = ["dirt|scratch", "dirt", "scratch | dirt", "dent"]
    rows = rows_of(tmp_path, labels, good=4)
    task = ImagesTask(ImageConfig(multilabel=True, class_weights=True))
    task.fit(splits_of(rows))
    assert task.labels == ["dent", "dirt", "scratch"]
    base.model.classifier = torch.nn.Linear(tiny.WIDTH, 3, dtype=torch.float64)
    batch = task.collate(task.encode_split(rows, READER).take(range(4)), READER)
    assert batch["labels"].tolist() == [[0, 1, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0]]
    logits_BK = base.model(pixel_values=batch["pixel_values"].double()).logits
    weights_K = torch.tensor([3.0, 1 / 3, 1.0], dtype=torch.float64)
    each_BK = F.binary_cross_entropy_with_logits(
        logits_BK, batch["labels"].double(), pos_weight=weights_K, reduction="none"
    )
    assert loss_of(task, batch, base).item() == pytest.approx(each_BK.mean(1).sum().item())


def test_lists_are_labels_too(tmp_path) -> None:
    rows = rows_of(tmp_path, [["a", "b"], ["b"], ["c"]], good=3)
    task = ImagesTask(ImageConfig(multilabel=True))
    task.fit(splits_of(rows))
    assert [row["labels"] for row in task.encode_split(rows, READER).rows] == [[0, 1], [1], [2]]


def test_examples_come_worst_first_and_answers_name_the_positive(tmp_path) -> None:
    task, rows = ready(tmp_path, positive="bad")
    encoded = task.encode_split(rows, READER)
    base = tiny.vit(torch.float32)
    base.model.classifier = torch.nn.Linear(tiny.WIDTH, 2)
    found = task.evaluate(base.model, encoded, READER, batch_size=3, device="cpu", generate=True)
    right = [example["correct"] for example in found.examples]
    assert right == sorted(right)
    assert found.metrics["accuracy"] == pytest.approx(sum(right) / 8)
    answers = task.predict(base.model, list(rows), READER, batch_size=5, device="cpu")
    assert [answer["input"] for answer in answers] == [row["image"]["path"] for row in rows]
    scores = {example["row"]: example["score"] for example in found.examples}
    for number, answer in enumerate(answers):
        assert answer["score"] == answer["probabilities"]["bad"] == pytest.approx(scores[number], abs=1e-5)
        assert answer["predicted"] == ("bad" if answer["score"] > 0.5 else "good")


def test_classes_come_equally_often_where_asked(tmp_path) -> None:
    from peftcli.data.sampler import BatchSampler

    task, rows = ready(tmp_path, balanced_sampling=True)
    classes = task.classes(task.encode_split(rows, READER))
    sampler = BatchSampler([1] * 8, 3, seed=1, classes=classes)
    for epoch in range(3):
        taken = [row for position in range(sampler.steps_per_epoch) for row in sampler.batch(epoch, position)]
        assert len(taken) == 8
        assert sum(classes[row] for row in taken) == 4
    assert sampler.batch(1, 0) == BatchSampler([1] * 8, 3, seed=1, classes=classes).batch(1, 0)
