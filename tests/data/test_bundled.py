"""What ships inside the package: found without a network, and as its card says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from peftcli.config import paths
from peftcli.config.compose import compose
from peftcli.config.errors import UserError
from peftcli.config.schema import DataConfig, ModelConfig
from peftcli.data import sources
from peftcli.data.duplicates import WORD
from peftcli.models import loading

CATEGORIES = DataConfig(source="bundled", name="wordnet-categories", columns={"text": "text", "label": "label"})
SPLITS = ("train", "validation", "test")


def rows(*columns: str) -> dict[str, list[dict]]:
    read = sources.load(CATEGORIES, list(columns))
    return {split: [dict(row) for row in getattr(read, split)] for split in SPLITS}


def test_every_category_is_in_every_split():
    found = rows("text", "label")
    assert {split: len(some) for split, some in found.items()} == {"train": 12003, "validation": 1996, "test": 4000}
    for some in found.values():
        assert len({row["label"] for row in some}) == 45
        assert all(row["text"].strip() and '"' not in row["text"] for row in some)


def test_no_definition_and_no_synset_is_there_twice():
    found = rows("text", "synset")
    texts = [" ".join(WORD.findall(row["text"].casefold())) for some in found.values() for row in some]
    synsets = [row["synset"] for some in found.values() for row in some]
    assert len(set(texts)) == len(texts) == len(set(synsets)) == 17999


@pytest.mark.parametrize("name", ["wordnet-categories", "mamba-wordnet"])
def test_the_licence_and_a_card_stand_beside_it(name):
    assert "Princeton" in (paths.bundled(name) / "LICENSE").read_text()
    assert (paths.bundled(name) / "README.md").read_text().startswith(("# ", "---"))
    assert sum(file.stat().st_size for file in paths.bundled(name).iterdir()) < 15 * 2**20


def test_the_bundled_model_loads_and_continues_a_definition():
    loaded = loading.load(ModelConfig("mamba-wordnet", source="bundled"), "fp32", "causal-lm", None)
    assert (loaded.base_id, loaded.family.name) == ("mamba-wordnet", "mamba")
    words = loaded.tokenizer("spaniel: a breed of", return_tensors="pt")
    written = loaded.model.generate(**words, max_new_tokens=8, do_sample=False)
    said = loaded.tokenizer.decode(written[0, words["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said.startswith(" ")
    assert "dog" in said


def test_the_recipe_counts_the_model_that_ships():
    written = compose("quickstart", ["model=mamba-wordnet", "method=full"]).config.model.shape
    shipped = yaml.safe_load((paths.bundled("mamba-wordnet") / "config.json").read_text())
    assert {key: shipped[key] for key in written} == written


def test_no_category_is_among_the_words_of_the_tokenizer():
    labels = {row["label"] for row in rows("label")["train"]}
    assert not labels & set(loading.tokenizer(ModelConfig("mamba-wordnet", source="bundled")).get_vocab())


def test_what_is_not_bundled_says_what_is(tmp_path: Path):
    with pytest.raises(UserError) as caught:
        paths.bundled("mamba-wordnt")
    (mistake,) = caught.value.mistakes
    assert mistake.nearest == "mamba-wordnet"
    assert set(mistake.allowed) == {"mamba-wordnet", "wordnet-categories"}
