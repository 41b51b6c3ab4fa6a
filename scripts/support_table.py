"""Write the table of methods and families into the README, from the rows that the tests hold to the contract.

A cell is what is tested, no more: a pair without a row is attached to a tiny model, and what the method says when it
refuses becomes a note.

Usage: python scripts/support_table.py [README.md]
"""

from __future__ import annotations

import sys
from importlib import import_module
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from peftcli.config.errors import CheckFailed, UserError  # noqa: E402
from peftcli.testing import tiny  # noqa: E402
from peftcli.testing.contract import MethodContract  # noqa: E402
from peftcli.testing.rows import Row  # noqa: E402

METHODS = ("sdt", "kpsvd", "sparse_adapter", "rowcol", "smat", "lora", "peft", "linear_probe", "full")
FAMILIES = {"mamba": tiny.mamba, "llama": tiny.llama, "vit": tiny.vit, "resnet": tiny.resnet}
TESTED, MERGES, UNTESTED, NO = "yes", "yes, merges", "not tested", "no"
STAR = r"\*"
BEGIN, END = "<!-- support: scripts/support_table.py -->", "<!-- /support -->"


def rows() -> list[Row]:
    """Every row of the contract classes in tests/methods."""
    for file in sorted((ROOT / "tests" / "methods").glob("test_*contract.py")):
        import_module(f"tests.methods.{file.stem}")
    return list(chain.from_iterable(cls.rows for cls in MethodContract.__subclasses__()))


def table() -> str:
    """The lines between the markers."""
    tested: dict[tuple[str, str], str] = {}
    for row in rows():
        key = (row.method, row.new_base().family.name)
        method = row.new_method()
        merges = method.saves == "adapter" and method.capabilities.merges
        tested[key] = MERGES if merges or tested.get(key) == MERGES else TESTED
    lines, notes = [f"| `method=` | {' | '.join(FAMILIES)} |", "| --- |" + " --- |" * len(FAMILIES)], {}
    for method in METHODS:
        cells = []
        for family, base in FAMILIES.items():
            cell = tested.get((method, family)) or refused(method, base, notes)
            cells.append(cell)
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{mark} {note}." for note, mark in notes.items())]).strip()


def refused(method: str, base: object, notes: dict[str, str]) -> str:
    """The cell of a pair that no row tests: what the method says to the model, once, in the notes."""
    pictures = base in (tiny.vit, tiny.resnet)
    try:
        Row(method, base=base, architecture="image-classification" if pictures else "causal-lm").attached()  # type: ignore[arg-type]
    except (UserError, CheckFailed) as error:
        what = error.what if isinstance(error, CheckFailed) else error.mistakes[0].what
        note = what.partition(";")[0]
        return f"{NO} {notes.setdefault(note, STAR * (len(notes) + 1))}"
    return UNTESTED


def update(readme: Path) -> str:
    """The page with the table as it is now."""
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise SystemExit(f"{readme} has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    page = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "README.md")
    page.write_text(update(page), encoding="utf-8")
