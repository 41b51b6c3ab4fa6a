"""Mistakes in recipes and overrides: all at once, each with its place, what is allowed and the nearest name."""

from __future__ import annotations

import pytest

from peftcli.config.compose import compose
from peftcli.config.errors import Mistake, UserError
from tests.minimal import RECIPE as GROUPS


@pytest.fixture
def mistakes(tmp_path, monkeypatch):
    """Compose a recipe of the given text and return its mistakes."""
    monkeypatch.chdir(tmp_path)

    def _mistakes(text: str, *overrides: str) -> list[Mistake]:
        (tmp_path / "own.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(UserError) as caught:
            compose("own.yaml", list(overrides))
        return caught.value.mistakes

    return _mistakes


def only(found: list[Mistake]) -> Mistake:
    assert len(found) == 1, "\n".join(map(str, found))
    return found[0]


def test_both_mistakes_of_the_issue_are_named():
    with pytest.raises(UserError) as caught:
        compose("quickstart", ["optim.lrr=1", "modle=x"])
    found = {mistake.where: mistake.nearest for mistake in caught.value.mistakes}
    assert found == {"override optim.lrr=1": "optim.lr", "override modle=x": "model"}


def test_mistakes_in_file_and_overrides_are_named_together(mistakes):
    text = GROUPS + "sed: 3\noptim:\n  lr: fast\ntask:\n  head: liner\n"
    found = mistakes(text, "a=[", "method=lorra", "training.precision=fp8", "optim.lr2=1,2")
    places = [mistake.where for mistake in found]
    assert sorted(places) == sorted(
        [
            "override a=[",
            "override method=lorra",
            "override training.precision=fp8",
            "override optim.lr2=1,2",
            "own.yaml:7",
            "own.yaml:9",
            "own.yaml:11",
        ]
    )


@pytest.mark.parametrize(
    ("line", "nearest"),
    [
        ("lr: 1", "optim.lr"),
        ("batch_size: 1", "training.batch_size"),
        ("optim: {batch_size: 1}", "training.batch_size"),
        ("training: {lr: 1}", "optim.lr"),
        ("model: {rows: 3}", "data.rows"),
        ("data: {targets: []}", "method.targets"),
        ("optimizer: {lr: 1}", "optim"),
        ("trainning: {epochs: 1}", "training"),
        ("method: {rr: 1}", "method.r"),
        ("task: {promt: x}", "task.prompt"),
        ("learning_rate: 1", "optim.lr"),
        ("training: {num_train_epochs: 1}", "training.epochs"),
        ("method: {rank: 3}", "method.r"),
    ],
)
def test_an_unknown_key_names_the_nearest(mistakes, line, nearest):
    mistake = only(mistakes(GROUPS + line + "\n"))
    assert mistake.nearest == nearest
    assert mistake.where == "own.yaml:7"
    assert "unknown key" in mistake.what


def test_a_renamed_key_says_since_when_and_how_to_rewrite(mistakes):
    mistake = only(mistakes(GROUPS + "learning_rate: 1\n"))
    assert "since schema version 1 it is optim.lr" in mistake.what
    assert "--upgrade" in mistake.hint


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("optim.lr=fast", "'fast' (text), expected a number"),
        ("training.batch_size=2.5", "2.5, expected a whole number"),
        ("training.batch_size=true", "true, expected a whole number"),
        ("training.batch_size=null", "null, expected a whole number"),
        ("training.keep_best=1", "1, expected true or false"),
        ("model.revision=12", "12, expected text"),
        ("optim.betas=[1]", "a list of 1, expected a list of 2"),
        ("optim.betas=0.9", "expected a list of 2"),
        ("method.targets=attention.q", "expected a list of text each"),
        ("data.columns=text", "expected keys with text each"),
        ("data.columns.text=3", "3, expected text"),
        ("data.rows.train=many", "'many' (text), expected a whole number"),
        ("training.eval_every=epoc", "expected a whole number or one of epoch, end"),
        ("method.targets=[3]", "3, expected text"),
        ("optim.clip_norm=big", "expected a number"),
    ],
)
def test_a_wrong_type_says_what_is_expected(mistakes, override, what):
    mistake = only(mistakes(GROUPS, override))
    assert mistake.where == f"override {override}"
    assert what in mistake.what


@pytest.mark.parametrize(
    ("override", "allowed", "nearest"),
    [
        ("task.head=liner", ("label_words", "linear"), "linear"),
        ("training.precision=bf61", ("auto", "fp32", "bf16", "fp16"), "bf16"),
        ("tracker.name=tensorbord", ("none", "tensorboard", "wandb", "mlflow", "trackio"), "tensorboard"),
        ("task.type=generatoin", ("classification", "generation"), "generation"),
        ("method.name=lorra", ("full", "linear_probe", "lora", "peft"), "lora"),
        ("training.eval_every=epoc", ("a whole number", "epoch", "end"), "epoch"),
        ("task.best_metric=acuracy", ("accuracy", "f1_macro", "balanced_accuracy", "loss"), "accuracy"),
        ("model=smolm2-135m", ("llama2-7b", "smollm2-135m"), "smollm2-135m"),
    ],
)
def test_a_wrong_choice_lists_what_is_allowed(mistakes, override, allowed, nearest):
    mistake = only(mistakes(GROUPS, override))
    assert set(allowed) <= set(mistake.allowed)
    assert mistake.nearest == nearest
    assert mistake.where == f"override {override}"


def test_a_recipe_without_a_method_lists_the_methods(mistakes):
    mistake = only(mistakes(GROUPS.replace("  - method: lora\n", "")))
    assert mistake.what == "the recipe has no method"
    assert {"lora", "peft", "linear_probe", "full"} <= set(mistake.allowed)
    assert "- method:" in mistake.hint


def test_an_empty_recipe_lacks_four_groups(mistakes):
    what = [mistake.what for mistake in mistakes("")]
    assert what == [f"the recipe has no {group}" for group in ("model", "data", "method", "task")]


def test_a_wrong_choice_of_a_missing_group_is_named_once(mistakes):
    mistake = only(mistakes(GROUPS.replace("  - method: lora\n", ""), "method=lorra"))
    assert mistake.nearest == "lora"


def test_a_group_written_as_text(mistakes):
    mistake = only(mistakes(GROUPS.replace("  - method: lora\n", "") + "method: lora\n"))
    assert mistake.where == "own.yaml:6"
    assert "`- method: lora`" in mistake.hint


def test_a_missing_group_file_names_its_line_and_the_choices(mistakes):
    mistake = only(mistakes(GROUPS.replace("smollm2-135m", "smolm2")))
    assert (mistake.where, mistake.nearest) == ("own.yaml:2", "smollm2-135m")
    assert "llama2-7b" in mistake.allowed


def test_an_unknown_group_in_the_defaults_list(mistakes):
    mistake = only(mistakes(GROUPS.replace("- task:", "- taks:")))
    assert (mistake.where, mistake.nearest) == ("own.yaml:5", "task")


def test_two_missing_group_files_are_both_named(mistakes):
    found = mistakes(GROUPS.replace("smollm2-135m", "smolm2").replace("reuters-r8", "routers-r8"))
    assert [mistake.where for mistake in found] == ["own.yaml:2", "own.yaml:4"]


@pytest.mark.parametrize("text", ["defaults: {model: a}\n", "defaults: lora\n", "defaults: [3]\n", "defaults: [[a]]\n"])
def test_a_malformed_defaults_list(mistakes, text):
    assert "`- model: NAME`" in mistakes(text)[0].hint


def test_yaml_that_is_no_yaml_has_a_line_and_no_consequences(mistakes):
    mistake = only(mistakes(GROUPS + "optim:\n\tlr: 1\n"))
    assert mistake.where == "own.yaml:8"
    assert "not valid YAML" in mistake.what
    assert "tabs" in mistake.hint


def test_broken_yaml_does_not_hide_a_mistaken_override(mistakes):
    found = mistakes("a: [\n", "optim.lrr=1", "modle=x")
    assert [mistake.where for mistake in found][1:] == ["override optim.lrr=1", "override modle=x"]


def test_a_broken_group_file_is_named_by_its_own_line(mistakes, tmp_path):
    (tmp_path / "configs" / "method").mkdir(parents=True)
    (tmp_path / "configs" / "method" / "mine.yaml").write_text("name: lora\nr: [\n")
    mistake = only(mistakes(GROUPS.replace("method: lora", "method: mine")))
    assert mistake.where.startswith("configs/method/mine.yaml:")


def test_a_users_group_file_is_checked_by_its_own_line(mistakes, tmp_path):
    (tmp_path / "configs" / "optim").mkdir(parents=True)
    (tmp_path / "configs" / "optim" / "mine.yaml").write_text("name: adamw\nlearnig_rate: 1\n")
    mistake = only(mistakes(GROUPS, "optim=mine"))
    assert mistake.where == "configs/optim/mine.yaml:2"


def test_every_duplicate_key_is_named(mistakes):
    found = mistakes(GROUPS + "seed: 1\noptim:\n  lr: 1\n  lr: 2\nseed: 3\n")
    assert [(m.what, m.where, m.hint) for m in found] == [
        ("optim.lr is given twice", "own.yaml:10", "the first is on line 9"),
        ("seed is given twice", "own.yaml:11", "the first is on line 7"),
    ]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("name: ${nothing.here}", "cannot be resolved"),
        ("name: ${name}", "cannot be resolved"),
        ("name: ${", "cannot be read"),
        ("name: ${no_such_resolver:3}", "cannot be resolved"),
        ("seed: ???", "has no value yet"),
        ("training: {batch_size: '???'}", "has no value yet"),
    ],
)
def test_bad_references(mistakes, line, what):
    mistake = only(mistakes(GROUPS + line + "\n"))
    assert what in mistake.what
    assert mistake.where == "own.yaml:7"


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("~optim.nothing", "unknown key to take away"),
        ("~nothing", "unknown key to take away"),
        ("+method.r=3", "already has a value"),
        ("foo@bar=lora", "unknown group 'foo'"),
        ("++model=smollm2-135m", "is a group"),
        ("+method=full", "already chooses a method"),
        ("hydra.run.dir=x", "unknown key 'hydra'"),
        ("name=${oc.env:NO_SUCH_VARIABLE}", "cannot be resolved"),
        ("seed=1,2", "several values at once"),
        ("seed=range(1,3)", "several values at once"),
        ("seed=choice(1,2)", "several values at once"),
        ("justaword", "'justaword' is not key=value"),
        ("=3", "cannot be read"),
        ("name=a b=[", "cannot be read"),
        ("model=3", "unknown model '3'"),
        ("seed.x=3", "expected a whole number"),
    ],
)
def test_overrides_that_hydra_would_refuse(mistakes, override, what):
    mistake = only(mistakes(GROUPS + "seed: 1\n", override))
    assert what in mistake.what
    assert mistake.where == f"override {override}"


def test_a_missing_recipe_names_the_nearest():
    with pytest.raises(UserError) as caught:
        compose("quikstart")
    assert only(caught.value.mistakes).nearest == "quickstart"
    with pytest.raises(UserError) as caught:
        compose("quickstart.yaml")
    assert only(caught.value.mistakes).nearest == "quickstart"


def test_a_missing_recipe_file_names_the_nearest_beside_it(mistakes, tmp_path):
    (tmp_path / "gloss.yaml").write_text("")
    with pytest.raises(UserError) as caught:
        compose(str(tmp_path / "glos.yaml"))
    assert only(caught.value.mistakes).nearest == str(tmp_path / "gloss.yaml")


def test_a_recipe_that_is_not_text(mistakes, tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        compose(str(tmp_path / "binary.yaml"))


def test_a_key_that_yaml_reads_as_something_else(mistakes):
    mistake = only(mistakes(GROUPS + "task:\n  labels: {yes: good, no: bad}\n")[:1])
    assert "quotes" in mistake.hint


def test_whole_numbers_as_keys_are_labels(mistakes, tmp_path):
    (tmp_path / "fine.yaml").write_text(GROUPS + "task:\n  labels: {0: bad, 1: good}\n")
    assert compose("fine.yaml").config.task.labels == {"0": "bad", "1": "good"}


def test_python_objects_are_refused(mistakes):
    mistake = only(mistakes(GROUPS + "name: !!python/object/apply:os.system ['true']\n"))
    assert mistake.where == "own.yaml:7"


def test_a_value_that_lost_its_equals_sign_is_put_back(mistakes):
    first, second = mistakes(GROUPS, "training.max_steps", "5", "foo", "seed=3")
    assert first.what == "'training.max_steps' is not key=value"
    assert first.nearest == "training.max_steps=5"
    assert (second.what, second.nearest) == ("'foo' is not key=value", "")
    assert only(mistakes(GROUPS, "training.max_steps 5")).nearest == "training.max_steps=5"
    assert only(mistakes(GROUPS, "seed", "=", "5")).nearest == "seed=5"
    one, other = mistakes(GROUPS, "training.max_steps", "sed=3")
    assert (one.nearest, other.nearest) == ("", "seed")


@pytest.mark.parametrize(
    ("override", "example"),
    [("data.rows=10", "rows: {train: 10}"), ("data.columns=text", "columns: {text: body}")],
)
def test_a_value_in_place_of_keys_gets_an_example(mistakes, override, example):
    assert example in only(mistakes(GROUPS, override)).hint


@pytest.mark.parametrize(
    ("overrides", "what", "near", "allowed"),
    [
        (["model.name=smolm2-135m"], "unknown model sample", "smollm2-135m", "vit-s14"),
        (["data.name=reuters-r9"], "unknown data sample", "reuters-r8", "wordnet"),
        (["model.name=reuters-r8"], "'reuters-r8' is data", "", "smollm2-135m"),
        (["data.name=smollm2-135m"], "'smollm2-135m' is weights", "", "reuters-r8"),
    ],
)
def test_a_sample_is_there_and_of_the_right_kind(mistakes, tmp_path, monkeypatch, overrides, what, near, allowed):
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))
    mistake = only(mistakes(GROUPS, *overrides))
    assert what in mistake.what
    assert mistake.where == f"override {overrides[0]}"
    assert mistake.nearest == near
    assert allowed in mistake.allowed
    assert not {"smollm2-135m", "reuters-r8"} <= set(mistake.allowed)


@pytest.mark.parametrize(
    ("overrides", "what", "near"),
    [
        (["model.source=bundled", "model.name=mamba-wordnt"], "unknown bundled weights", "mamba-wordnet"),
        (["model.source=bundled", "model.name=wordnet-categories"], "unknown bundled weights", ""),
        (["data.source=bundled", "data.name=wordnet-category"], "unknown bundled data", "wordnet-categories"),
    ],
)
def test_what_is_not_bundled_is_named_with_what_is(mistakes, overrides, what, near):
    mistake = only(mistakes(GROUPS, *overrides))
    assert what in mistake.what
    assert (mistake.where, mistake.nearest) == (f"override {overrides[1]}", near)
    assert len(mistake.allowed) == 1


def test_a_sample_of_the_users_own_making_is_no_mistake(mistakes, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "samples" / "words").mkdir(parents=True)
    assert "unknown" in only(mistakes(GROUPS, "data.name=words")).what
    (tmp_path / "cache" / "samples" / "words" / "complete").touch()
    assert compose("own.yaml", ["data.name=words"]).config.data.name == "words"
