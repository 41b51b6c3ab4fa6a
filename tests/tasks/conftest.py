"""A tokenizer, a language model and splits small enough for a test."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest

from peftcli.data.rows import Rows
from tests.tiny import build_llama, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def plain_tokenizer():
    """One without a chat template, for tests that change it."""
    return make_tokenizer(chat=None)


@pytest.fixture(autouse=True)
def own_cache(request, tmp_path, monkeypatch):
    """Nothing is kept from test to test, except the samples for those that need them."""
    if "samples" not in request.keywords:
        monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make_llama(tokenizer):
    """`build_llama` for the tokenizer's vocabulary."""
    return partial(build_llama, len(tokenizer))


@pytest.fixture
def llama(make_llama):
    return make_llama()


@pytest.fixture
def splits():
    """A function from dictionaries to splits as the data room gives them."""

    def numbered(rows):
        return None if rows is None else Rows.from_list([{"row": i, **row} for i, row in enumerate(rows)])

    def build(train, validation=None, test=None):
        return SimpleNamespace(train=numbered(train), validation=numbered(validation), test=numbered(test))

    return build
