"""Rows in memory: an Arrow table that reads as a list of dictionaries.

`datasets` costs a second and a half to import, pyarrow a tenth of it; only the hub needs the former.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import pyarrow as pa
from pyarrow import compute


class Rows(Sequence):
    """A split, or an encoded split: `rows[3]` is a dictionary, `rows["text"]` a column, `len(rows)` the count.

    Args:
        table: The columns; kept as one chunk each, so that access by index costs the same everywhere.
    """

    def __init__(self, table: pa.Table):
        self.table = table.combine_chunks().replace_schema_metadata(None)

    @classmethod
    def from_list(cls, rows: list[dict[str, Any]]) -> Rows:
        """Rows out of dictionaries; a key that is missing from some of them is None there."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        return cls(pa.table({name: pa.array([row.get(name) for row in rows]) for name in names}))

    def __repr__(self) -> str:
        return f"Rows({len(self)} x {', '.join(self.column_names)})"

    @property
    def column_names(self) -> list[str]:
        return self.table.column_names

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, key: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, key: str) -> list[Any]: ...
    @overload
    def __getitem__(self, key: slice) -> Rows: ...
    def __getitem__(self, key):
        if isinstance(key, str):
            return self.table.column(key).to_pylist()
        if isinstance(key, slice):
            return self.select(range(*key.indices(len(self))))
        if not -len(self) <= key < len(self):
            raise IndexError(f"row {key} of {len(self)}")
        return self.table.slice(key % len(self), 1).to_pylist()[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.table.to_batches(max_chunksize=1000):
            yield from batch.to_pylist()

    def select(self, indices: Iterable[int]) -> Rows:
        """The rows at these positions, in this order, as `Rows`."""
        return Rows(self.table.take(whole_numbers(indices)))

    def take(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """The rows at these positions, in this order, as dictionaries: what a batch is collated from."""
        return self.table.take(whole_numbers(indices)).to_pylist()

    def lengths(self, column: str = "input_ids") -> list[int]:
        """Length of the list in each row of a column, in tokens for `input_ids`."""
        return compute.list_value_length(self.table.column(column)).to_pylist()

    def fingerprint(self) -> str:
        """SHA-256 of names, types and values; not of chunking, file format or place, nor of where pictures are."""
        digest = hashlib.sha256()
        table = _placeless(self.table)
        plain = table.cast(pa.schema([(field.name, _plain(field.type)) for field in table.schema]))
        with pa.ipc.new_stream(pa.PythonFile(_Hasher(digest), mode="w"), plain.schema) as stream:
            stream.write_table(plain.combine_chunks(), max_chunksize=65536)
        return digest.hexdigest()


def whole_numbers(values: Iterable[int]) -> pa.Array:
    """An int64 array. `pa.array` would import pandas first, which takes longer than to read most data sets."""
    raw = array("q", values)
    return pa.Array.from_buffers(pa.int64(), len(raw), [None, pa.py_buffer(raw)])


class _Hasher:
    """A file that keeps only the hash of what is written."""

    closed = False

    def __init__(self, digest):
        self.digest = digest

    def write(self, data) -> int:
        self.digest.update(data)
        return len(data)

    def flush(self) -> None: ...

    def close(self) -> None: ...


def _placeless(table: pa.Table) -> pa.Table:
    """Without the `file` of each picture, its place on this machine; its path in the source and its `id` stay."""
    for place, field in enumerate(table.schema):
        if not pa.types.is_struct(field.type) or field.type.get_field_index("file") < 0:
            continue
        kept = [child.name for child in field.type if child.name != "file"]
        column = table.column(place).combine_chunks()
        parts = [compute.struct_field(column, name) for name in kept]
        table = table.set_column(place, field.name, pa.StructArray.from_arrays(parts, names=kept))
    return table


def _plain(kind: pa.DataType) -> pa.DataType:
    """One type for the several in which Arrow keeps the same strings, so that the file format leaves no trace."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_string(kind) or pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_integer(kind):
        return pa.int64()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.large_list(_plain(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _plain(field.type)) for field in kind])
    return kind
