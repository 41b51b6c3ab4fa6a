"""Writing a split as parquet, and cutting one by a hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def write(out: Path, split: str, rows: list[dict], image: str = "") -> None:
    """Writes one split as `out/<split>.parquet`.

    Args:
        rows: All with the same keys; strings and numbers, or `{"bytes", "path"}` in the column `image`.
        image: The column that the `datasets` library is to decode as pictures.
    """
    table = pa.Table.from_pylist(rows)
    if image:
        scalars = {pa.string(): "string", pa.float64(): "float64", pa.int64(): "int64"}
        features = {f.name: {"_type": "Value", "dtype": scalars.get(f.type)} for f in table.schema}
        features[image] = {"_type": "Image"}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, out / f"{split}.parquet", compression="zstd", row_group_size=1000)


def percentile(key: str) -> int:
    """0 to 99 by the hash of a key: a cut that needs no seed and does not move when rows come and go."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 100
