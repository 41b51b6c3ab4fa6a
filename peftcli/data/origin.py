"""One split at its source: what a local file, a sample and a hub data set have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import pyarrow as pa

from peftcli.config.errors import Mistake
from peftcli.data import formats
from peftcli.data.rows import Rows, whole_numbers


class Origin(Protocol):
    """One split at its source."""

    where: str

    def columns(self) -> list[tuple[str, list[str]]]:
        """Column names by file, from the first rows."""

    def read(self, mapping: dict[str, str]) -> tuple[Rows, list[Mistake]]:
        """All rows with the mapping's columns and `row`, and the lines that are no rows."""

    def lines(self, mapping: dict[str, str]) -> Iterator[formats.Line]:
        """The same one by one, in order, each with its place."""

    def identity(self) -> str:
        """What is known of the contents without reading them all."""


def numbered(table: pa.Table) -> pa.Table:
    """The table with the column `row`, the position of each row, from 0."""
    if "row" in table.column_names:
        table = table.drop_columns("row")
    return table.append_column("row", whole_numbers(range(table.num_rows)))
