"""Data sets of the Hugging Face hub. The only file that imports `datasets`, and only when it is asked for one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from peftcli.config.errors import Mistake, UserError
from peftcli.config.schema import DataConfig
from peftcli.data import formats
from peftcli.data.origin import Origin, numbered
from peftcli.data.rows import Rows
from peftcli.models.checkpoint import hub_answers

OFFLINE = (
    "without a network: data.source=bundled data.name=wordnet-categories, data.source=files data.files.train=FILE, a "
    "fetched sample (data.source=sample, see peft samples list), or a hub data set that is already in the Hugging Face "
    "cache"
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


def find(config: DataConfig, notes: list[str]) -> dict[str, Origin]:
    """All splits of a hub data set, by the hub's names. A stream is pinned to the commit that the hub has now.

    Raises:
        UserError: There is none of that name, or no network and no copy in the cache.
    """
    name = str(config.name)
    here = Path(name).exists()
    offline = not here and not hub_answers()
    import datasets
    from huggingface_hub import constants, errors

    if offline:  # otherwise the library tries for half a minute; what is cached still loads
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    revision = None if here or offline or not config.streaming else _commit(name, config.revision)
    if config.streaming:
        notes.append(_pinned(name, revision))
    revision = revision or config.revision
    try:
        found = datasets.load_dataset(name, config.subset, revision=revision, streaming=config.streaming)
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
    label = " ".join(filter(None, [name, config.subset, revision]))
    return {str(s): HubOrigin(d, f"{name} {s}", f"{label} {s}") for s, d in found.items()}


def _commit(name: str, revision: str | None) -> str | None:
    """The commit that a branch, tag or nothing stands for; None where the hub does not say."""
    from huggingface_hub import HfApi, errors

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=10).sha
    except (errors.HTTPError, OSError, ValueError):  # what is wrong shows again, and is explained, when it is loaded
        return None


def _pinned(name: str, commit: str | None) -> str:
    if commit:
        return f"{name} is streamed at commit {commit}; data.revision={commit} repeats it"
    return f"{name} is streamed and not pinned: the commit is not known, so its fingerprint does not see a change there"


def _first(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
