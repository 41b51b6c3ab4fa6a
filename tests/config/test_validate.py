"""The validator alone: any tree gives a run or mistakes, never an exception; annotations of every supported kind."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftcli.config import validate as module
from peftcli.config.compose import compose
from peftcli.config.frozen import plain
from peftcli.config.rules import conflicts
from peftcli.config.schema import RunConfig
from peftcli.config.validate import UNREADABLE, schema_keys, validate

VALID = compose("smollm2/wordnet-gloss_lora").tree

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just(UNREADABLE))
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    return [
        place
        for key, value in tree.items()
        for place in [(*path, key), *(leaves(value, (*path, key)) if isinstance(value, dict) else [])]
    ]


KEYS = [place for place in leaves(VALID) if len(place) == 2 and place not in (("method", "name"), ("task", "type"))]


def replaced(place: tuple[str, ...], value: Any) -> dict[str, Any]:
    tree = copy.deepcopy(VALID)
    inner = tree
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return tree


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(place=st.sampled_from(leaves(VALID)), value=values)
def test_any_value_anywhere_gives_a_run_or_a_mistake(place, value):
    checked = validate(replaced(place, value), lambda key: f"at {key}")
    mistakes = checked.mistakes + conflicts(checked)
    for mistake in mistakes:
        assert mistake.what
        assert str(mistake)
    if not mistakes and value is not UNREADABLE:
        assert isinstance(checked.config, RunConfig)
        again = validate(plain(checked.config), str)
        assert again.mistakes == []
        assert again.config == checked.config


@settings(max_examples=100, deadline=None)
@given(tree=st.dictionaries(st.sampled_from([*VALID, "x", "lr"]), values, max_size=5))
def test_any_tree_gives_a_run_or_mistakes(tree):
    checked = validate(tree, str)
    conflicts(checked)
    for group in ("model", "data", "method", "task"):
        if tree.get(group) is not UNREADABLE:
            assert any(group in mistake.what for mistake in checked.mistakes)


@settings(max_examples=100, deadline=None)
@given(place=st.sampled_from(KEYS), suffix=st.sampled_from("xyz"))
def test_a_mistyped_key_is_always_named_with_its_nearest(place, suffix):
    group, name = place
    tree = replaced(place, None)
    tree[group][name + suffix] = tree[group].pop(name)
    checked = validate(tree, str)
    (unknown,) = [mistake for mistake in checked.mistakes if mistake.what.startswith("unknown key")]
    assert unknown.nearest == f"{group}.{name}"


def test_unreadable_values_are_not_named_again():
    tree = replaced(("optim", "lr"), UNREADABLE)
    assert validate(tree, str).mistakes == []


def test_schema_keys_follow_the_chosen_method_and_task():
    from peftcli.config import catalog
    from peftcli.config.schema import GenerationConfig

    keys = schema_keys({"method": catalog.settings_class("lora"), "task": GenerationConfig})
    assert {"method.r", "task.completion", "optim.lr", "seed"} <= set(keys)
    assert "task.head" not in keys


@dataclass
class _Inner:
    depth: int = 1
    kind: Literal["a", 3, None] = "a"


@dataclass
class _Outer:
    inner: _Inner = field(default_factory=_Inner)
    several: dict[str, _Inner] = field(default_factory=dict)
    pair: tuple[int, str] = (1, "a")
    many: tuple[float, ...] = ()
    mixed: list[int | str] = field(default_factory=list)
    maybe: _Inner | None = None
    numbers: dict[str, list[float]] = field(default_factory=dict)


def check(tree: dict[str, Any]) -> tuple[Any, list[str]]:
    checker = module._Checker(str, {}, {}, frozenset())
    return checker.settings(_Outer, tree, ""), [mistake.what for mistake in checker.mistakes]


@pytest.mark.parametrize(
    ("tree", "read"),
    [
        ({"inner": {"depth": 4}}, lambda outer: outer.inner == _Inner(4)),
        ({"inner": {"kind": 3}}, lambda outer: outer.inner.kind == 3),
        ({"inner": {"kind": None}}, lambda outer: outer.inner.kind is None),
        ({"several": {"x": {"depth": 2}}}, lambda outer: outer.several == {"x": _Inner(2)}),
        ({"pair": [3, "b"]}, lambda outer: outer.pair == (3, "b")),
        ({"many": [1, 2.5]}, lambda outer: outer.many == (1.0, 2.5) and type(outer.many[0]) is float),
        ({"mixed": [1, "x"]}, lambda outer: outer.mixed == [1, "x"]),
        ({"maybe": None}, lambda outer: outer.maybe is None),
        ({"numbers": {"a": [1]}}, lambda outer: outer.numbers == {"a": [1.0]}),
    ],
)
def test_annotations_accept(tree, read):
    outer, mistakes = check(tree)
    assert mistakes == []
    assert read(outer)


@pytest.mark.parametrize(
    ("tree", "what"),
    [
        ({"inner": {"depth": True}}, "inner.depth is true, expected a whole number"),
        ({"inner": {"depth": 1.0}}, "inner.depth is 1.0, expected a whole number"),
        ({"inner": {"kind": True}}, "inner.kind cannot be True"),
        ({"inner": {"kind": "3"}}, "inner.kind cannot be '3'"),
        ({"inner": None}, "inner is null, expected a group of keys"),
        ({"several": {"x": {"dept": 2}}}, "unknown key 'several.x.dept'"),
        ({"several": {"x": 2}}, "several.x is 2, expected a group of keys"),
        ({"pair": [3]}, "pair is a list of 1, expected a list of 2: a whole number, text"),
        ({"pair": [3, 4]}, "pair.1 is 4, expected text"),
        ({"many": ["a"]}, "many.0 is 'a' (text), expected a number"),
        ({"mixed": [1.5]}, "mixed.0 is 1.5, expected a whole number or text"),
        ({"numbers": {"a": 1}}, "numbers.a is 1, expected a list of a number each"),
    ],
)
def test_annotations_refuse(tree, what):
    assert check(tree)[1] == [what]
