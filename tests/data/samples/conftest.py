"""A cache of its own for every test, and a sample made on the spot."""

import dataclasses
import hashlib
import os
import zipfile

import pytest
from tiny_sample import CONVERSIONS

from peftcli.data.samples import catalog, store

OUTSIDE = os.environ.get("PEFTCLI_CACHE")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))
    CONVERSIONS.clear()
    return store.home()


@pytest.fixture
def shared_cache(cache, monkeypatch):
    """Undoes the cache of its own: for tests of real samples, which take minutes to fetch twice."""
    monkeypatch.delenv("PEFTCLI_CACHE")
    if OUTSIDE is not None:
        monkeypatch.setenv("PEFTCLI_CACHE", OUTSIDE)


@pytest.fixture
def archives(tmp_path):
    folder = tmp_path / "archives"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny/a.txt", "words")
    return folder


@pytest.fixture
def sample(archives, monkeypatch):
    """A row for the archive in `archives`, under the name `tiny`."""
    data = next(archives.iterdir()).read_bytes()
    row = dataclasses.replace(
        catalog.find("gsm8k-test")[0],
        name="tiny",
        package="tiny",
        version="1.0",
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        members=("tiny/*.txt",),
        convert="tiny_sample:convert",
        licence="CC0-1.0",
    )
    monkeypatch.setitem(catalog.BY_NAME, "tiny", row)
    return row


@pytest.fixture
def conversions():
    return CONVERSIONS
