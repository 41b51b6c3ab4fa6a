"""Tokenised rows, kept by content: the same rows through the same encoding are read, not computed again."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from peftcli.config import paths
from peftcli.data.rows import Rows

LOG = logging.getLogger(__name__)


def encode(rows: Rows, fn: Callable[[dict[str, Any]], dict[str, Any]], key: str) -> Rows:
    """`fn` of each row, from the cache where it was computed before.

    Several processes may do this at once: a file gets its name only when it is complete. A damaged file is found by
    its checksums and written anew.

    Args:
        rows: A split.
        fn: A row to numbers and lists of numbers; every row must give the same keys.
        key: All that `fn` depends on besides the row: settings, tokenizer, version.

    Returns:
        As many rows, in the same order.
    """
    name = hashlib.sha256(f"{key} {rows.fingerprint()}".encode()).hexdigest()
    path = paths.cache() / "encoded" / f"{name}.parquet"
    if (kept := _read(path, len(rows))) is not None:
        return kept
    table = _narrow(Rows.from_list([fn(row) for row in rows]).table)
    try:
        _write(table, path)
    except OSError as error:
        LOG.warning("tokenised rows are not kept for the next run: %s", error)
    return Rows(table)


def _narrow(table: pa.Table) -> pa.Table:
    """Token ids in 32 bits: half the memory."""
    types = [pa.list_(pa.int32()) if pa.types.is_list(field.type) else field.type for field in table.schema]
    return table.cast(pa.schema(list(zip(table.column_names, types, strict=True))))


def _read(path: Path, count: int) -> Rows | None:
    if not path.is_file():
        return None
    try:
        table = parquet.ParquetFile(path, page_checksum_verification=True).read()
    except (OSError, pa.ArrowException) as error:
        LOG.warning("%s is damaged and is made anew: %s", path, str(error).splitlines()[0])
        return None
    return Rows(table) if table.num_rows == count else None


def _write(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".unfinished")
    os.close(handle)
    try:
        parquet.write_table(table, unfinished, compression="zstd", write_page_checksum=True)
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
