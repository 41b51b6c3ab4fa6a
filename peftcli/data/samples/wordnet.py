"""WordNet 3.0: from the database files to rows of word, gloss and one of 45 lexicographer categories.

The format is wndb(5WN): `offset category_number pos word_count word lex_id ... | gloss`, after lines of licence that
begin with two spaces.
"""

from __future__ import annotations

import re
from pathlib import Path

from peftcli.data.samples.table import percentile, write

POS = {"n": "noun", "v": "verb", "a": "adj", "s": "adj", "r": "adv"}
CATEGORIES = [
    "adj.all",
    "adj.pert",
    "adv.all",
    "noun.Tops",
    "noun.act",
    "noun.animal",
    "noun.artifact",
    "noun.attribute",
    "noun.body",
    "noun.cognition",
    "noun.communication",
    "noun.event",
    "noun.feeling",
    "noun.food",
    "noun.group",
    "noun.location",
    "noun.motive",
    "noun.object",
    "noun.person",
    "noun.phenomenon",
    "noun.plant",
    "noun.possession",
    "noun.process",
    "noun.quantity",
    "noun.relation",
    "noun.shape",
    "noun.state",
    "noun.substance",
    "noun.time",
    "verb.body",
    "verb.change",
    "verb.cognition",
    "verb.communication",
    "verb.competition",
    "verb.consumption",
    "verb.contact",
    "verb.creation",
    "verb.emotion",
    "verb.motion",
    "verb.perception",
    "verb.possession",
    "verb.social",
    "verb.stative",
    "verb.weather",
    "adj.ppl",
]  # lexnames(5WN), in the order of their numbers
MARKER = re.compile(r"\((a|p|ip)\)$")  # where an adjective may stand: before its noun, predicative, right after it
SPLITS = ("train", "validation", "test")


def convert(source: Path, out: Path) -> dict:
    """One row per synset: `word` (its first), `gloss`, `definition` (the gloss without its examples), `category`,
    `pos`, `synset`; cut 90/5/5 by a hash of the synset, so that no synset is in two splits."""
    parts: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    for pos in ("noun", "verb", "adj", "adv"):
        text = next(source.rglob(f"data.{pos}")).read_text(encoding="utf-8")
        lines = text.splitlines()
        for row in (_row(line) for line in lines if not line.startswith("  ")):
            place = percentile(row["synset"])
            parts["train" if place < 90 else "validation" if place < 95 else "test"].append(row)
        notice = [line.lstrip().partition(" ")[2].rstrip() for line in lines if line.startswith("  ")]
    (out / "LICENSE").write_text("\n".join(notice) + "\n", encoding="utf-8")
    for split, rows in parts.items():
        write(out, split, rows)
    counts = {split: len(rows) for split, rows in parts.items()}
    return {"splits": "ours, 90/5/5 by a hash of the synset", "rows": counts, "categories": CATEGORIES}


def _row(line: str) -> dict[str, str]:
    data, _, gloss = line.partition(" | ")
    offset, category, pos, _, word, *_ = data.split()
    gloss = gloss.strip()
    return {
        "word": MARKER.sub("", word).replace("_", " "),
        "gloss": gloss,
        "definition": gloss.partition('; "')[0],
        "category": CATEGORIES[int(category)],
        "pos": POS[pos],
        "synset": f"{POS[pos]}-{offset}",
    }
