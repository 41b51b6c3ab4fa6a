"""The scripts behind the bundled model and data: what is held out, how batches are cut, a run that was stopped."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

SCRIPTS = Path(__file__).parents[2] / "scripts"
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def row(number: int, category: str = "noun.act", definition: str = "") -> dict[str, str]:
    nouns = ("otter", "kettle", "willow", "magnet", "lantern", "harbour", "violin", "glacier", "ledger", "saddle")
    words = [nouns[(number // 10**place) % 10] for place in range(4)]
    given = definition or f"{words[0]} beside a {words[1]} of {words[2]} under {words[3]}"
    return {
        "word": f"word {number}", "definition": given, "gloss": given, "category": category, "pos": "noun",
        "synset": f"noun-{number:08d}",
    }  # fmt: skip


def test_equal_definitions_stay_once_and_not_where_they_stand_for_two_categories(script):
    build = script("build_wordnet_categories")
    synsets = [
        row(1, definition="A small cat."), row(2, definition="a small cat"), row(3, definition="a thing"),
        row(4, "noun.animal", definition="a thing"), row(5, definition='to speak: "he spoke"'),
    ]  # fmt: skip
    assert [one["synset"] in ("noun-00000001", "noun-00000002") for one in build.candidates(synsets)] == [True]


def test_rare_categories_are_in_each_split(script):
    build = script("build_wordnet_categories")
    pool = [row(number, "noun.motive" if number < 12 else f"noun.{number % 2}") for number in range(2000)]
    splits = build.choose(sorted(pool, key=build.by_hash), total=360, least=18)
    rare = {split: sum(one["category"] == "noun.motive" for one in some) for split, some in splits.items()}
    assert rare == {"train": 8, "validation": 1, "test": 3}
    assert abs(sum(map(len, splits.values())) - 360) <= 2


def test_batches_hold_each_document_once_an_epoch_within_their_budget(script):
    corpus = script("wordnet_corpus")
    lengths = np.random.default_rng(0).integers(2, 60, 500)
    epoch, seen = [], 0
    for batch in corpus.batches(lengths, 256, seed=3):
        assert len(batch) * lengths[batch].max() <= 256
        epoch.append(batch)
        if (seen := seen + len(batch)) == 500:
            break
    assert sorted(np.concatenate(epoch)) == list(range(500))
    again = itertools.islice(corpus.batches(lengths, 256, seed=3), len(epoch))
    assert all((one == other).all() for one, other in zip(epoch, again, strict=True))


def test_padding_is_not_predicted_and_the_tokenizer_writes_every_text(script):
    corpus = script("wordnet_corpus")
    tokenizer = corpus.train_tokenizer([corpus.document(row(number)) for number in range(200)], 400)
    texts = ["word: naïve 日本", "a"]
    documents = corpus.encode(texts, tokenizer)
    assert tokenizer.batch_decode(documents, skip_special_tokens=True) == texts
    assert [ids[-1] for ids in documents] == [tokenizer.eos_token_id] * 2
    assert tokenizer.unk_token is None
    inputs_RL, labels_RL = corpus.pad(documents)
    assert (labels_RL != corpus.IGNORED).sum(1).tolist() == [len(ids) for ids in documents]
    assert inputs_RL[1, len(documents[1]) :].unique().tolist() == [tokenizer.pad_token_id]


def test_a_run_that_was_stopped_ends_as_one_that_was_not(script, tmp_path, monkeypatch):
    pretrain, corpus = script("pretrain_mamba"), script("wordnet_corpus")
    monkeypatch.setattr(script("mamba_card"), "copy_licence", lambda folder: None)  # it needs the sample
    data = corpus.Corpus([f"{row(n)['word']}: {row(n)['gloss']}" for n in range(300)], ["word: a thing", "cat: a pet"])
    plan = pretrain.Plan(steps=7, tokens=128, rate=1e-2, warmup=2, threads=1, save_every=3, log_every=2)
    straight = pretrain.Run(data, SHAPE, plan, tmp_path / "straight")
    ended = straight.run()
    assert ended["held_out_loss"] == pytest.approx(straight.log[-2]["held_out_loss"], abs=2e-3)  # read back whole
    assert ended["held_out_loss"] < straight.log[1]["held_out_loss"]
    stopped = pretrain.Run(data, SHAPE, plan, tmp_path / "stopped")
    monkeypatch.setattr(stopped, "save", lambda save=stopped.save: (save(), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        stopped.run()
    resumed = pretrain.Run(data, SHAPE, plan, tmp_path / "stopped")
    resumed.go_on()
    assert resumed.step == 3
    assert resumed.run()["held_out_loss"] == ended["held_out_loss"]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "stopped"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {str(first[name].dtype) for name in first if name.endswith(("A_log", "D", "norm.weight"))} == {
        "torch.float32"
    }
    card = (tmp_path / "stopped" / "README.md").read_text()
    assert "7 steps" in card
    assert f"{ended['held_out_loss']:.3f} nats a token" in card


@pytest.mark.samples
def test_nothing_that_is_evaluated_is_in_the_corpus(script):
    from peftcli.config.compose import compose
    from peftcli.data import sources

    wordnet, corpus = script("wordnet"), script("wordnet_corpus")
    made = corpus.corpus()
    read = sources.load(compose("quickstart", ["data=wordnet-categories"]).config.data, ["text", "label", "synset"])
    held = [one for split in (read.train, read.validation, read.test) for one in split]
    shut = {one["synset"] for one in held}
    documents = set(made.train + made.held_out)
    assert len(made.held_out) == 1500
    assert not set(made.train) & set(made.held_out)
    texts = {wordnet.words(one["text"]) for one in held}
    for synset in wordnet.rows():
        if synset["synset"] in shut or wordnet.words(synset["definition"]) in texts:
            assert corpus.document(synset) not in documents
    labels = {one["label"] for one in held}
    assert not [text for text in made.train for label in labels if label in text]


@pytest.mark.samples
def test_the_bundled_rows_are_what_the_script_makes(script, tmp_path):
    build = script("build_wordnet_categories")
    build.save(build.choose(build.candidates(script("wordnet").rows())), tmp_path)
    for file in build.OUT.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name
