"""Data sets of the Hugging Face hub. The only file that imports `datasets`, and only when it is asked for one."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pyarrow as pa

from peftcli.config.errors import Mistake, UserError
from peftcli.config.schema import DataConfig
from peftcli.data import formats
from peftcli.data.origins import Origin, numbered
from peftcli.data.rows import Rows

OFFLINE = (
    "without a network: data.source=files data.files.train=FILE, a fetched sample (data.source=sample, "
    "see peft samples list), or a hub data set that is already in the Hugging Face cache"
)


class HubOrigin:
    """One split of a hub data set, in memory or streamed; class numbers become class names."""

    def __init__(self, dataset: Any, where: str, identity: str):
        self.dataset, self.where, self._identity = dataset, where, identity

    def columns(self) -> list[tuple[str, list[str]]]:
        names = self.dataset.column_names or list(next(iter(self.dataset)))
        return [(self.where, list(names))]

    def lines(self, mapping: dict[str, str]) -> Iterator[formats.Line]:
        names = {name: self._class_names(column) for name, column in mapping.items()}
        for number, row in enumerate(self.dataset):
            picked = {name: _class_name(row.get(column), names[name]) for name, column in mapping.items()}
            yield f"{self.where} row {number}", picked

    def read(self, mapping: dict[str, str]) -> tuple[Rows, list[Mistake]]:
        if not hasattr(self.dataset, "__len__"):
            return Rows.from_list([{**row, "row": i} for i, (_, row) in enumerate(self.lines(mapping))]), []  # type: ignore
        table = self.dataset.with_format("arrow")[:]
        columns = {}
        for name, column in mapping.items():
            names = self._class_names(column)
            values = table.column(column)
            columns[name] = pa.array([_class_name(v, names) for v in values.to_pylist()]) if names else values
        return Rows(numbered(pa.table(columns))), []

    def identity(self) -> str:
        return self._identity

    def _class_names(self, column: str) -> list[str] | None:
        return getattr((self.dataset.features or {}).get(column), "names", None)


def _class_name(value: Any, names: list[str] | None) -> Any:
    """A hub data set marks a missing class with -1."""
    if names is None or not isinstance(value, int):
        return value
    return names[value] if value >= 0 else None


def find(config: DataConfig) -> dict[str, Origin]:
    """All splits of a hub data set, by the hub's names.

    Raises:
        UserError: There is none of that name, or no network and no copy in the cache.
    """
    name = str(config.name)
    offline = not Path(name).exists() and not _reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    import datasets
    from huggingface_hub import constants, errors

    if offline:  # otherwise the library tries for half a minute; what is cached still loads
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        found = datasets.load_dataset(name, config.subset, revision=config.revision, streaming=config.streaming)
    except (datasets.exceptions.DatasetNotFoundError, errors.RepositoryNotFoundError) as error:
        what = f"no data set {name!r} on the hub: {_first(error)}"
        raise UserError(Mistake(what, "data.name", hint=OFFLINE)) from error
    except (ConnectionError, errors.OfflineModeIsEnabled, FileNotFoundError) as error:
        what = "the hub cannot be reached and {!r} is not in its cache" if offline else "cannot load {!r}: {}"
        raise UserError(Mistake(what.format(name, _first(error)), "data.name", hint=OFFLINE)) from error
    except (ValueError, RuntimeError) as error:
        hint = (
            "data sets that run code of their own are not loaded; take a parquet copy" if "script" in str(error) else ""
        )
        raise UserError(Mistake(f"cannot load {name!r}: {_first(error)}", "data", hint=hint)) from error
    label = " ".join(filter(None, [name, config.subset, config.revision]))
    return {str(s): HubOrigin(d, f"{name} {s}", f"{label} {s}") for s, d in found.items()}


def _reachable(endpoint: str) -> bool:
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        url = urlparse(endpoint)
        socket.create_connection((url.hostname or "", url.port or 443), timeout=3).close()
    except OSError:
        return False
    return True


def _first(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
