"""Build the bundled data set wordnet-categories: a definition, and which of 45 lexicographer categories it is of.

    peft samples fetch wordnet
    python scripts/build_wordnet_categories.py            # writes peftcli/bundled/wordnet-categories

The same rows come out each time: what is taken and where it goes follows a hash of the synset.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from itertools import accumulate, pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from wordnet import SPLITS, by_hash, copy_licence, rows, words

from peftcli.data.duplicates import near

OUT = Path(__file__).resolve().parents[1] / "peftcli" / "bundled" / "wordnet-categories"
SHARES = {"train": 12 / 18, "validation": 2 / 18, "test": 4 / 18}
ROWS = 18_000
LEAST = 90
"""Rows of a category, where it has as many: 20 of them to test on."""

Row = dict[str, str]


def candidates(synsets: list[Row]) -> list[Row]:
    """One row a definition: none that quotes an example, none that stands for two categories, no near copies."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(synsets, key=by_hash):
        groups[words(row["definition"])].append(row)
    alone = [
        group[0]
        for text, group in groups.items()
        if text and '"' not in group[0]["definition"] and len({row["category"] for row in group}) == 1
    ]
    copies = {pair.second for pair in near([row["definition"] for row in alone])}
    return [row for place, row in enumerate(alone) if place not in copies]


def choose(pool: list[Row], total: int = ROWS, least: int = LEAST) -> dict[str, list[Row]]:
    """About `total` rows in WordNet's own proportions, rare categories up to `least`; each category cut alike."""
    by_category: dict[str, list[Row]] = defaultdict(list)
    for row in pool:
        by_category[row["category"]].append(row)
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    rare = {name for name, group in by_category.items() if len(group) * total <= least * len(pool)}
    kept = sum(min(len(by_category[name]), least) for name in rare)
    share = (total - kept) / sum(len(group) for name, group in by_category.items() if name not in rare)
    for name, group in sorted(by_category.items()):
        taken = group[: least if name in rare else round(share * len(group))]
        ends = [0, *(round(part * len(taken)) for part in accumulate(SHARES.values()))]
        for split, (start, end) in zip(SHARES, pairwise(ends), strict=True):
            splits[split] += taken[start:end]
    return {split: sorted(chosen, key=by_hash) for split, chosen in splits.items()}


def save(splits: dict[str, list[Row]], out: Path) -> None:
    """The parquet files, the card and the licence."""
    out.mkdir(parents=True, exist_ok=True)
    for split, chosen in splits.items():
        columns = {"word": "word", "text": "definition", "label": "category", "synset": "synset"}
        table = pa.table({name: [row[column] for row in chosen] for name, column in columns.items()})
        pq.write_table(table, out / f"{split}.parquet", compression="zstd", compression_level=19)
    (out / "README.md").write_text(card(splits), encoding="utf-8")
    copy_licence(out)


CARD = """# wordnet-categories

What kind of thing does a definition define? `text` is a definition of WordNet 3.0 without its examples, `label` the
category in which WordNet's lexicographers filed it: 45 of them, such as `noun.animal` or `verb.motion`. `word` is the
first word of the synset, `synset` its part of speech and offset.

{sizes}

**How it was built.** `scripts/build_wordnet_categories.py`, from the sample `wordnet` (`peft samples fetch wordnet`).
Of equal definitions one stays, and none where they are in different categories; of nearly equal ones (Jaccard
similarity of their three-word shingles 0.8 or more) one stays; definitions that quote an example are left out. Rows
are taken in WordNet's own proportions, but at least {least} of a category where there are as many. Each category is cut
12 : 2 : 4. Order and choice follow the SHA-256 of the synset. No definition is in two splits, whatever its case and
punctuation.

**Held out.** The bundled model `mamba-wordnet` saw none of these synsets and none of these definitions, not even those
of the train split.

**What it is not.** The categories are WordNet's filing, not a test of meaning: adj.all and adv.all hold most of their
part of speech, and definitions have a style of their own. The shares are not those of running text.

**Licence.** WordNet 3.0, Copyright 2006 by Princeton University: it may be used, changed and passed on with the notice
in `LICENSE`.

| category | train | validation | test |
| --- | ---: | ---: | ---: |
{counts}
"""


def card(splits: dict[str, list[Row]]) -> str:
    """The data card, with the counts."""
    counts = {split: Counter(row["category"] for row in chosen) for split, chosen in splits.items()}
    lines = [
        f"| {name} | " + " | ".join(str(counts[split][name]) for split in SPLITS) + " |"
        for name in sorted(counts["train"])
    ]
    sizes = ", ".join(f"{len(chosen):,} {split}" for split, chosen in splits.items())
    return CARD.format(sizes=f"Rows: {sizes}.", least=LEAST, counts="\n".join(lines))


def main() -> None:
    """Build it and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    splits = choose(candidates(rows()))
    save(splits, out)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {', '.join(f'{len(r):,} {s}' for s, r in splits.items())}; {size / 2**20:.2f} MB")


if __name__ == "__main__":
    main()
