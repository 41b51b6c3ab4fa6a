"""What the scripts share about the sample `wordnet`: its rows, when two definitions are equal, an order by hash."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pyarrow.parquet as pq

from peftcli.config import paths
from peftcli.data.duplicates import WORD

SPLITS = ("train", "validation", "test")


def rows() -> list[dict[str, str]]:
    """Every synset: word, gloss, definition, category, pos, synset. The sample's own cut is not used."""
    folder = paths.sample_folder("wordnet")
    return [row for split in SPLITS for row in pq.read_table(folder / f"{split}.parquet").to_pylist()]


def words(text: str) -> str:
    """The text without differences of case, white space and punctuation."""
    return " ".join(WORD.findall(text.casefold()))


def by_hash(row: dict[str, str]) -> bytes:
    """The key of an order that needs no seed and does not move when rows come and go."""
    return hashlib.sha256(row["synset"].encode()).digest()


def copy_licence(folder: Path) -> None:
    """WordNet's notice, which has to go wherever its text goes."""
    shutil.copyfile(paths.sample_folder("wordnet") / "LICENSE", folder / "LICENSE")
