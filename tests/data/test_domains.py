"""Several sources as domains: classes shared out without leaks, and what is refused."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from peftcli.config.errors import UserError
from peftcli.config.schema import DataConfig, DomainConfig
from peftcli.data import sources


@pytest.fixture
def rows(tmp_path: Path):
    """`rows("a", classes=8, each=4)` writes a csv of texts and gives its domain."""

    def write(name: str, classes: int = 8, each: int = 4, **more) -> DomainConfig:
        path = tmp_path / f"{name}.csv"
        with path.open("w", newline="") as file:
            out = csv.writer(file)
            out.writerow(["text", "label", "cell", "thing"])
            for c in range(classes):
                for i in range(each):
                    out.writerow([f"{name} {c} {i}", f"class{c}", "even" if i % 2 == 0 else "odd", f"{c}-{i // 2}"])
        return DomainConfig(source="files", files={"train": str(path)}, **more)

    return write


def load(domains: dict[str, DomainConfig], **more) -> sources.Splits:
    shares = {"validation_share": 0.25, "test_share": 0.25}
    return sources.load(DataConfig(source="domains", domains=domains, **{**shares, **more}), ["text", "label"])


def classes(split, domain: str) -> set[str]:
    return {label for label, name in zip(split["label"], split["domain"], strict=True) if name == domain}


def refused(domains: dict[str, DomainConfig], **more) -> str:
    with pytest.raises(UserError) as caught:
        load(domains, **more)
    return str(caught.value)


def test_classes_belong_to_one_split_and_held_out_domains_to_the_test(rows) -> None:
    found = load({"a": rows("a"), "b": rows("b", classes=6), "far": rows("far", classes=3, held_out=True)})
    for domain, count in (("a", 8), ("b", 6)):
        parts = [classes(split, domain) for split in (found.train, found.validation, found.test)]
        assert set().union(*parts) == {f"class{c}" for c in range(count)}
        assert sum(map(len, parts)) == count
        assert all(len(part) >= 2 for part in parts)
    assert classes(found.test, "far") == {"class0", "class1", "class2"}
    assert not classes(found.train, "far")
    assert set(found.test["role"]) == {"own", "held out"}
    assert set(found.train["split"]) == {"train"}
    numbers = [row for split in (found.train, found.validation, found.test) for row in split["row"]]
    assert len(set(numbers)) == len(numbers) == 4 * 17


def test_the_seed_decides_and_nothing_else(rows) -> None:
    one, again, other = (load({"a": rows("a", classes=20)}, seed=seed) for seed in (0, 0, 1))
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert classes(one.test, "a") != classes(other.test, "a")
    beside = load({"z": rows("z"), "a": rows("a", classes=20)})
    assert classes(beside.test, "a") == classes(one.test, "a")


def test_classes_can_be_named_filtered_and_thinned(rows) -> None:
    named = rows("a")
    named.classes = {"test": ["class1", "class2"], "validation": []}
    found = load({"a": named})
    assert classes(found.test, "a") == {"class1", "class2"}
    assert found.validation is None
    assert len(classes(found.train, "a")) == 6
    odd = load({"a": rows("a", only={"cell": "odd"}), "b": rows("b", distinct="thing")})
    total = sum(len(split) for split in (odd.train, odd.validation, odd.test))
    assert total == 8 * 2 + 8 * 2
    assert any("one of each thing" in note for note in odd.notes)


def test_a_domain_like_another_has_its_test_classes_alone(rows) -> None:
    found = load({"again": rows("again", like="a"), "a": rows("a")})
    assert classes(found.test, "again") == classes(found.test, "a")
    assert classes(found.train, "again") == set()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"each": 1}, "0 of 8 classes have 2 rows or more"),
        ({"classes": 1}, "1 of 1 classes have 2 rows or more"),
        ({"classes": 4}, "4 classes leave 0 for train"),
        ({"least": 5}, "0 of 8 classes have 5 rows or more"),
        ({"only": {"cell": "blue"}}, "blue"),
        ({"distinct": "colour"}, "column 'colour' not found"),
        ({"like": "b"}, "unknown domain 'b'"),
    ],
    ids=lambda one: str(one)[:30],
)
def test_what_gives_no_tasks_is_named_with_its_domain(rows, more, said) -> None:
    message = refused({"mine": rows("mine", **more), "other": rows("other")})
    assert said in message
    assert "data.domains.mine" in message or "colour" in message


def test_wrong_class_names_are_told_with_the_nearest(rows) -> None:
    wrong = rows("a")
    wrong.classes = {"test": ["clas1", "class2"]}
    assert "class1" in refused({"a": wrong})
    twice = rows("a")
    twice.classes = {"test": ["class1", "class2"], "validation": ["class2", "class3"]}
    assert "in two splits" in refused({"a": twice})
    assert "none is left to train on" in refused({"a": rows("a", held_out=True)})
