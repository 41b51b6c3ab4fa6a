"""Text classification: the label set, label words, encoding, measuring, predicting."""

from __future__ import annotations

import json

import pytest
import torch

from peftcli.config.errors import CheckFailed, UserError
from peftcli.config.schema import ClassificationConfig, DataConfig
from peftcli.data import sources
from peftcli.data.collate import pad
from peftcli.tasks import metrics, registry

ROWS = [
    {"text": "The film was good", "label": "good"},
    {"text": "A stupid plot", "label": "bad"},
    {"text": "A wonderful cast", "label": "good"},
    {"text": "the music was bad " * 20, "label": "bad"},
]
PROMPT = "Question: {text} Sentiment: "


def made(splits, **settings):
    task = registry.build(ClassificationConfig(**{"prompt": PROMPT, "max_length": 24, **settings}))
    task.fit(splits)
    return task


def test_one_supervised_position_at_the_end_and_the_templates_words_survive(splits, tokenizer):
    data = splits(ROWS)
    task = made(data)
    assert (task.labels, task.needed, task.architecture) == (["bad", "good"], ["text", "label"], "causal-lm")
    encoded = task.encode_split(data.train, tokenizer)
    rows = encoded.take(range(4))
    assert [row["labels"][-1] for row in rows] == [1, 0, 1, 0]
    assert all(label == -100 for row in rows for label in row["labels"][:-1])
    assert all(tokenizer.decode(row["input_ids"]).endswith(" Sentiment:") for row in rows)
    assert encoded.lengths == [len(row["input_ids"]) for row in rows]
    assert max(encoded.lengths) <= 24
    counts = {"rows": 4, "tokens": sum(encoded.lengths), "trained_tokens": 4, "truncated": 1, "dropped": 0}
    assert encoded.counts == counts
    # The prompt's last space went to the words, where the vocabulary has it.
    assert task.words == [tokenizer(word)["input_ids"][0] for word in (" bad", " good")]
    assert task.show(rows[0], tokenizer).plain.startswith("Question: The film was good Sentiment:[[ g")


def test_words_stand_right_after_a_line_break(splits, tokenizer):
    task = made(splits(ROWS), prompt="{text}\n")
    task.tokens(tokenizer)
    assert [tokenizer.decode([word])[0] for word in task.words] == ["b", "g"]


def test_colliding_words_are_named(splits, tokenizer):
    data = splits([{"text": "x", "label": label} for label in ("film", "films", "good")])
    with pytest.raises(UserError, match=r"'film', 'films' begin with the same token ' film'") as caught:
        made(data).tokens(tokenizer)
    assert caught.value.mistakes[0].where == "task.labels"
    task = made(data, labels={"films": "Topic"})
    task.tokens(tokenizer)
    assert len(set(task.words)) == 3


def test_scripts_without_spaces_use_the_word_alone(splits, tokenizer):
    data = splits([{"text": "x", "label": "a"}, {"text": "x", "label": "b"}])
    task = made(data, prompt="{text}:", labels={"a": "日", "b": "本"})
    with pytest.raises(UserError, match="same token"):  # the same first byte, with and without a space
        task.tokens(tokenizer)
    task = made(data, prompt="{text}:", labels={"a": "日", "b": "ünï"})
    task.tokens(tokenizer)
    assert len(set(task.words)) == 2


@pytest.mark.parametrize("split", ["validation", "test"])
def test_label_without_training_rows(splits, split):
    data = splits(ROWS, **{split: [{"text": "x", "label": "neutral"}] * 3})
    with pytest.raises(CheckFailed, match=rf"{split} split.*'neutral' \(3 rows\)") as caught:
        made(data)
    assert caught.value.check == "label-mismatch"


def test_label_mistakes(splits, tokenizer):
    with pytest.raises(CheckFailed, match="one label"):
        made(splits(ROWS[:1]))
    with pytest.raises(UserError, match="unknown label 'goof'"):
        made(splits(ROWS), labels={"goof": "fine"})
    with pytest.raises(CheckFailed, match="row 7 has label 'x'"):
        made(splits(ROWS)).encode({"row": 7, "text": "t", "label": "x"}, tokenizer)
    with pytest.raises(UserError, match="unknown metric 'acuracy'"):
        made(splits(ROWS), best_metric="acuracy")
    with pytest.raises(UserError, match=r"longer than task\.max_length=3"):
        made(splits(ROWS), max_length=3).encode(ROWS[0], tokenizer)


def test_labels_of_a_stream_are_those_it_begins_with_and_those_the_recipe_names(tmp_path, tokenizer):
    files = {split: tmp_path / f"{split}.jsonl" for split in ("train", "test")}
    for path in files.values():
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = DataConfig(source="files", files={split: str(path) for split, path in files.items()}, streaming=True)
    data = sources.load(config, ["text", "label"])
    task = made(data, labels={"mixed": "stupid"})
    assert task.labels == ["bad", "good", "mixed"]
    assert task.encode({"row": 9, "text": "x", "label": "mixed"}, tokenizer)["labels"][-1] == 2
    assert task.baselines(data) == []


def test_number_labels_are_ordered_as_numbers(splits):
    data = splits([{"text": "x", "label": n} for n in (10, 9, 2, -1)])
    assert made(data).labels == ["-1", "2", "9", "10"]


@pytest.mark.parametrize("head", ["label_words", "linear"])
def test_evaluation_does_not_depend_on_batches_and_leaves_the_model_as_it_was(splits, tokenizer, make_llama, head):
    data = splits(ROWS)
    task = made(data, head=head)
    model = make_llama(labels=2 if head == "linear" else None)
    model.train()
    model.model.layers[1].eval()
    encoded = task.encode_split(data.train, tokenizer)
    one, four = (task.evaluate(model, encoded, tokenizer, batch_size=n, device="cpu", generate=True) for n in (1, 4))
    assert one.metrics == pytest.approx(four.metrics)
    assert set(one.metrics) == {"accuracy", "balanced_accuracy", "f1_macro", "loss"}
    assert [e["row"] for e in one.examples] == [0, 1, 2, 3]
    assert [e["expected"] for e in one.examples] == ["good", "bad", "good", "bad"]
    assert one.metrics["accuracy"] == sum(e["correct"] for e in one.examples) / 4
    assert model.training
    assert not model.model.layers[1].training
    predicted = task.predict(model, [{"text": row["text"]} for row in ROWS], tokenizer, batch_size=3, device="cpu")
    assert [p["predicted"] for p in predicted] == [e["predicted"] for e in one.examples]
    assert [p["score"] for p in predicted] == pytest.approx([e["score"] for e in one.examples])
    assert sum(predicted[0]["probabilities"].values()) == pytest.approx(1)


def test_measured_loss_is_the_trained_one(splits, tokenizer, llama):
    data = splits(ROWS)
    task = made(data)
    encoded = task.encode_split(data.train, tokenizer)
    trained = task.loss(llama, pad(encoded.take(range(4)), 0))
    measured = task.evaluate(llama, encoded, tokenizer, batch_size=2, device="cpu").metrics["loss"]
    assert measured == pytest.approx(trained.total.item() / trained.weight, rel=1e-5)


def test_it_learns(splits, tokenizer, make_llama):
    data = splits(ROWS)
    task, model = made(data), make_llama(dtype=torch.float32)
    encoded = task.encode_split(data.train, tokenizer)
    batch, optimiser = pad(encoded.take(range(4)), 0), torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(15):
        task.loss(model, batch).total.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert (
        task.evaluate(model, encoded, tokenizer, batch_size=2, device="cpu", precision="bf16").metrics["accuracy"] == 1
    )


def test_metrics_agree_with_scikit_learn():
    from sklearn import metrics as sk

    torch.manual_seed(0)
    scores = torch.randn(200, 5).log_softmax(1)
    targets = torch.randint(4, (200,))  # class 4 is predicted but never true
    found, predicted = metrics.classification(scores, targets), scores.argmax(1)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(targets, predicted))
    assert found["f1_macro"] == pytest.approx(sk.f1_score(targets, predicted, average="macro"), rel=1e-5)
    with pytest.warns(UserWarning, match="y_pred"):
        expected = sk.balanced_accuracy_score(targets, predicted)
    assert found["balanced_accuracy"] == pytest.approx(expected, rel=1e-5)
    assert found["loss"] == pytest.approx(sk.log_loss(targets, scores.exp().double(), labels=range(5)), rel=1e-5)


def test_baselines_learn_from_training_rows_only(splits):
    train = [{"text": f"{color} {i}", "label": color} for color in ("red", "blue") for i in range(7)][:-1]
    test = [{"text": f"so {color}", "label": color} for color in ("blue", "red", "blue")]
    data = splits(train, test=test)
    majority, tfidf = made(data, prompt="{text}").baselines(data)
    assert majority.name == "majority class"
    assert majority.metrics["accuracy"] == pytest.approx(1 / 3)
    assert tfidf.metrics["accuracy"] == 1
    assert tfidf.metrics["loss"] < majority.metrics["loss"]
    assert made(data, prompt="{text}").baselines(splits(train)) == []


def test_rows_too_few_for_the_named_labels_are_one_mistake(splits):
    with pytest.raises(UserError, match="no training row has 6 of these labels: a, b, c, d, e,") as caught:
        made(splits(ROWS), labels={name: name * 2 for name in "abcdef"})
    assert len(caught.value.mistakes) == 1
    assert "data.rows.train" in str(caught.value)
