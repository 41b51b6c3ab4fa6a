"""`peft predict`, `merge` and `eval` of few-shot runs: a user's classes from a handful of examples, and wrong ones."""

from __future__ import annotations

import ast
import csv
import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from peftcli.methods.frozen.settings import Settings as Frozen
from peftcli.methods.full.settings import Settings as Full
from peftcli.methods.lora.settings import Settings as Lora
from peftcli.methods.smat.settings import Settings as Smat
from tests import few_shot, pictures
from tests.commands import assert_said, run_readme

METHODS = {
    "smat": Smat(experts=3, sparsity=0.5),
    "full": Full(),
    "lora": Lora(r=2, targets=["all"]),
    "frozen": Frozen(),
}
SHOTS = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Domains to train on, and a user's own classes: some pictures of each as `support`, the others as `new`."""
    folder = tmp_path_factory.mktemp("few")
    for seed, name in enumerate(("one", "two")):
        few_shot.make_domain(folder / name, 12, 6, seed)
    few_shot.make_domain(folder / "mine", 3, 7, 11)
    for kind in ("support", "new"):
        shutil.copytree(folder / "mine", folder / kind)
        for path in sorted((folder / kind).rglob("*.png")):
            if (int(path.stem) < SHOTS) != (kind == "support"):
                path.unlink()
    return folder


@pytest.fixture(scope="module")
def finished(place):
    """`finished("vit", "smat")` is the folder of a finished run."""
    from peftcli.training.run import run

    @cache
    def train(kind: str, method: str) -> Path:
        domains = {name: few_shot.domain(place / name) for name in ("one", "two")}
        checkpoint = pictures.make_checkpoint(place / kind, kind)
        made = few_shot.make_run(checkpoint, domains, place / "runs" / f"{kind}-{method}", method=METHODS[method],
                                 optim={"lr": 0.01})  # fmt: skip
        run(made.path, quiet=True)
        return made.path

    return train


def answers(result) -> list[dict]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["predictions"]


def test_pictures_are_told_apart_by_a_few_examples_and_the_choice_is_explained(peft, place, finished, tmp_path) -> None:
    run = finished("vit", "smat")
    asked = ("--support", place / "support", "--input", place / "new")
    result = peft("predict", run, *asked, "--explain", "--output", tmp_path / "out.csv")
    assert_said(result, 0, "support: 9 rows of 3 classes (class0, class1, class2)", "of 3 experts it chose ",
                "an equal share is 33.3%", "of the run's own tasks, those of", "rows whose label is known")  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert len(rows) == 12
    assert sum(row["image"].startswith(row["predicted"]) for row in rows) >= 10
    found = json.loads(peft("predict", run, *asked, "--explain", "--json").stdout)
    about = found["support"]["experts"]
    assert sum(about["weights"]) == pytest.approx(1, abs=1e-6)
    assert all(density <= 0.5 for density in about["density"])
    assert {one["domain"] for one in about["nearest"]} == {"one", "two"}
    assert found["support"]["classes"] == {"class0": 3, "class1": 3, "class2": 3}
    for row in found["predictions"]:
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-6)
        assert row["probabilities"][row["predicted"]] == row["score"]


def test_names_and_order_of_the_support_change_nothing(peft, place, finished, tmp_path) -> None:
    names = {"class0": "zebra", "class1": "apple", "class2": "mouse"}
    for old, new in names.items():
        shutil.copytree(place / "support" / old, tmp_path / "other" / new)
        for number, path in enumerate(sorted((tmp_path / "other" / new).iterdir(), reverse=True)):
            path.rename(path.with_name(f"again{number}.png"))
    first, second = (
        answers(peft("predict", finished("vit", "smat"), "--support", support, "--input", place / "new", "--json"))
        for support in (place / "support", tmp_path / "other")
    )
    assert [names[row["predicted"]] for row in first] == [row["predicted"] for row in second]
    assert [row["score"] for row in first] == pytest.approx([row["score"] for row in second], abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("vit", "smat"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("resnet", "smat"), ("vit", "full"), ("vit", "lora"), ("vit", "frozen"))
        ),
    ],
)
def test_a_tasks_plain_model_answers_as_the_run_does(peft, place, finished, tmp_path, kind, method) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    run, to = finished(kind, method), tmp_path / "merged"
    result = peft("merge", run, "--support", place / "support", "--to", to)
    assert_said(result, 0, "gives all 9 rows of the support the class", "model of 3 classes")
    before = answers(peft("predict", run, "--support", place / "support", "--input", place / "new", "--json"))
    after = answers(peft("predict", to, "--input", place / "new", "--json"))
    assert_said(peft("predict", to, "--input", place / "new", "--support", place / "support"), 2, "no few-shot tasks")
    assert [row["predicted"] for row in after] == [row["predicted"] for row in before]
    assert [row["score"] for row in after] == pytest.approx([row["score"] for row in before], abs=0.15)
    model = AutoModelForImageClassification.from_pretrained(to).eval()
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.classifier.parameters()) == sum(
        value.numel() for name, value in load_file(place / kind / "model.safetensors").items()
        if "classifier" not in name and "running" not in name and "num_batches" not in name
    )  # fmt: skip
    processor = AutoImageProcessor.from_pretrained(to)
    for row in before:
        read = processor(Image.open(place / "new" / row["image"]).convert("RGB"), return_tensors="pt")
        with torch.no_grad():
            assert model.config.id2label[model(**read).logits.argmax().item()] == row["predicted"]


@pytest.mark.parametrize("kind", ["vit", pytest.param("resnet", marks=pytest.mark.slow)])
def test_a_tasks_graph_and_program_answer_as_the_run_does(peft, place, finished, tmp_path, kind) -> None:
    run, to, support = finished(kind, "smat"), tmp_path / "graph", place / "support"
    result = peft("merge", run, "--support", support, "--to", to, "--onnx", "--pt2", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["rows"], found["outputs"], found["source"]) == (9, 3, "pictures of the support set")
    assert all(found["files"][name]["drift"]["share"] < 1e-4 for name in ("model.onnx", "model.pt2"))
    assert found["merge"]["agreement"] == 1
    before = answers(peft("predict", run, "--support", support, "--input", place / "new", "--json"))
    told = ast.literal_eval(run_readme(to, PICTURE=str(place / "new" / before[0]["image"])))
    assert max(told, key=told.get) == before[0]["predicted"]
    assert told == pytest.approx(before[0]["probabilities"], abs=0.15)
    model, shape = torch.export.load(to / "model.pt2").module(), (5, 3, 16, 16)
    assert model(torch.randn(shape)).shape == (5, 3)
    assert_said(peft("merge", run, "--support", support, "--to", to, "--onnx"), 2, "already there")


def test_eval_measures_tasks_and_what_becomes_of_them(peft, finished) -> None:
    run = finished("vit", "smat")
    result = peft("eval", run, "--episodes", "3", "--then", "lora", "--then-lr", "0.01", "--then-steps", "3")
    assert_said(result, 0, "test split, 6 tasks", "tuned, then lora", "then lora: 3 steps at 0.01", "accuracy two")
    found = json.loads(peft("eval", run, "--episodes", "3", "--then", "full", "--then-lr", "0", "--json").stdout)
    base, tuned, then = found["quality"]["rows"]
    assert then["name"] == "tuned, then full"
    assert then["metrics"] == pytest.approx(tuned["metrics"], abs=1e-5)
    assert tuned["metrics"] != base["metrics"]
    assert set(tuned["intervals"]) == {"accuracy", "accuracy_one", "accuracy_two"}


def test_a_learning_rate_is_chosen_on_validation_classes(peft, finished, monkeypatch) -> None:
    from peftcli.training import few_shot as tuning

    monkeypatch.setattr(tuning, "RATES", (0.0, 1e-3))
    result = peft("eval", finished("vit", "smat"), "--episodes", "2", "--then", "lora", "--then-steps", "2")
    assert_said(result, 0, "by accuracy on 6 tasks of validation classes: 0 ", "0.001 ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--then", "lorra"], ("unknown method 'lorra'", "did you mean: lora")),
        (["--then", "smat"], ("method smat learns from many tasks",)),
        (["--then", "frozen"], ("method frozen trains nothing",)),
        (["--then-lr", "1e-3"], ("--then-lr goes with --then",)),
        (["--limit", "3"], ("--limit counts rows", "--episodes N")),
    ],
)
def test_eval_says_what_cannot_be(peft, finished, arguments, words) -> None:
    assert_said(peft("eval", finished("vit", "smat"), *arguments), 2, *words)


def one_class(folder: Path) -> None:
    for name in ("class1", "class2"):
        shutil.rmtree(folder / name)


def no_class(folder: Path) -> None:
    for path in sorted(folder.rglob("*.png")):
        path.rename(folder / f"{path.parent.name}{path.name}")
    for name in ("class0", "class1", "class2"):
        (folder / name).rmdir()


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def unreadable(folder: Path) -> None:
    (folder / "class1" / "1.png").write_bytes(b"no picture")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (one_class, ("--support: the support set has one class, 'class0'", "two classes or more")),
        (no_class, ("--support: ", "has no sub-folder with pictures in it", "the folder above")),
        (emptied, ("--support: ", "has no sub-folder with pictures in it", "/good")),
        (unreadable, ("class1/1.png: picture is not-an-image", "data.bad_rows=skip")),
        (shutil.rmtree, ("--support: no folder or file", "did you mean: ")),
    ],
    ids=["one class", "no class", "empty", "unreadable", "not there"],
)
def test_a_support_set_that_is_none(peft, place, finished, tmp_path, spoil, words) -> None:
    support = shutil.copytree(place / "support", tmp_path / "mysupport")
    (tmp_path / "mysupports").mkdir()
    spoil(support)
    for command in (("predict", "--input", place / "new"), ("merge", "--to", tmp_path / "to")):
        result = peft(command[0], finished("vit", "smat"), "--support", support, *command[1:])
        assert_said(result, 2, *words)


def test_unreadable_pictures_may_be_left_out_and_are_counted(peft, place, finished, tmp_path) -> None:
    support = shutil.copytree(place / "support", tmp_path / "support")
    unreadable(support)
    asked = ("--support", support, "--input", place / "new")
    assert_said(peft("predict", finished("vit", "smat"), "data.bad_rows=skip", *asked), 0, "left out 1 of 9 rows")
    for path in (support / "class1").iterdir():
        path.write_bytes(b"no picture")
    result = peft("predict", finished("vit", "smat"), "data.bad_rows=skip", *asked)
    assert_said(result, 0, "support: no row of class1 is left")


def test_labels_that_the_support_lacks_are_named(peft, place, finished, tmp_path) -> None:
    for names, words in (
        ({"class0": "class0", "class1": "strange"}, "4 rows of the input are of strange, which the support does not"),
        ({"class0": "klass0"}, "no class of the support: klass0 (did you mean class0?)"),
    ):
        folder = tmp_path / "-".join(names.values())
        for old, new in names.items():
            shutil.copytree(place / "new" / old, folder / new)
        result = peft("predict", finished("vit", "smat"), "--support", place / "support", "--input", folder)
        assert_said(result, 0, words)


def test_runs_and_options_that_do_not_go_together(peft, place, finished, trained, tmp_path) -> None:
    run, support = finished("vit", "smat"), place / "support"
    assert_said(peft("predict", run, "--input", place / "new"), 2, "needs examples of each class", "--support FOLDER")
    whole = finished("vit", "full") / "model"
    assert_said(peft("predict", whole, "--input", place / "new"), 2, "knows no classes", "--support FOLDER")
    assert_said(peft("predict", run, "--input", place / "new", "--explain"), 2, "--explain goes with --support")
    assert_said(peft("merge", run, "--to", tmp_path / "to"), 2, "--support FOLDER")
    assert_said(peft("merge", run, "--to", tmp_path / "to", "--onnx"), 2, "no graph of it alone", "--support FOLDER")
    words = trained("words").path
    assert_said(peft("predict", words, "--support", support, "--text", "good"), 2, "takes no few-shot tasks")
    assert_said(peft("eval", words, "--episodes", "3"), 2, "--episodes: ", "takes no few-shot tasks")
    result = peft("predict", finished("vit", "lora"), "--support", support, "--input", place / "new", "--explain")
    assert_said(result, 0, "support: 9 rows", "this run has no experts")
    other = pictures.make_checkpoint(tmp_path / "other", "vit", hidden_size=16)
    result = peft("predict", run, f"model.name={other}", "--support", support, "--input", place / "new")
    assert_said(result, 1, "base-mismatch")


def texts(path: Path, classes: dict[str, str], rows: int) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows((f"the {word} was {'very ' * (i % 3)}{word}", label) for label, word in classes.items()
                         for i in range(rows))  # fmt: skip
    return path


WORDS = {"a": "film", "b": "plot", "c": "good", "d": "bad", "e": "was", "f": "the"}


@pytest.fixture(scope="module")
def text_run(checkpoint, tmp_path_factory) -> Path:
    from peftcli.training.run import run

    folder = tmp_path_factory.mktemp("texts")
    rows = texts(folder / "rows.csv", WORDS, 6)
    more = {"task": {"reads": "text", "image_size": None}, "data": {"validation_share": 0, "test_share": 0.34}}
    made = few_shot.make_run(checkpoint, {"words": few_shot.domain(rows)}, folder / "runs",
                             method=Smat(experts=2, sparsity=0.5), **more)  # fmt: skip
    run(made.path, quiet=True)
    return made.path


def test_texts_by_a_file_of_examples(peft, text_run, tmp_path) -> None:
    from transformers import AutoModel, AutoTokenizer

    classes = {"movie": "film", "praise": "good"}
    support, asked = (texts(tmp_path / f"{name}.csv", classes, 3) for name in ("support", "new"))
    result = peft("predict", text_run, "--support", support, "--input", asked, "--explain", "--json")
    found = answers(result)
    assert [row["predicted"] for row in found] == [row["label"] for row in found]
    assert_said(peft("predict", text_run, "--support", support, "--text", "the film was film"), 0, "movie")
    to = tmp_path / "merged"
    assert_said(peft("merge", text_run, "--support", support, "--to", to), 0, "prototypes beside it", "2 classes")
    onnx = peft("merge", text_run, "--support", support, "--to", tmp_path / "onnx", "--onnx")
    assert_said(onnx, 2, "a graph ends in the scores of a head, and a task of texts has none", "leave out --onnx")
    alone = answers(peft("predict", to, "--input", asked, "--json"))
    assert [row["predicted"] for row in alone] == [row["predicted"] for row in found]
    for row, before in zip(alone, found, strict=True):
        assert row["probabilities"] == pytest.approx(before["probabilities"], abs=1e-4)
    assert_said(peft("predict", to, "--text", "the film was film"), 0, "movie  (")
    assert_said(peft("predict", to, "--text", "film", "--support", support), 2, "takes no few-shot tasks")
    model, words = AutoModel.from_pretrained(to).eval(), AutoTokenizer.from_pretrained(to)
    means = load_file(to / "prototypes.safetensors")["prototypes"]
    for row in found:
        with torch.no_grad():
            hidden = model(input_ids=words(row["text"], return_tensors="pt").input_ids).last_hidden_state
        cosines = torch.cosine_similarity(hidden[0].mean(0), means)
        assert (10 * cosines).softmax(0).max().item() == pytest.approx(row["score"], abs=1e-4)
        assert ["movie", "praise"][int(cosines.argmax())] == row["predicted"]
    code = (to / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert '"movie", "praise"' in code
    compile(code, "README.md", "exec")
    (to / "prototypes.safetensors").unlink()
    assert_said(peft("predict", to, "--text", "film"), 1, "adapter-keys", "a prototype of each of 2 classes")
    support.write_text("text,kind\na film,movie\n")
    assert_said(peft("predict", text_run, "--support", support, "--text", "film"), 2, "column 'label' not found")
