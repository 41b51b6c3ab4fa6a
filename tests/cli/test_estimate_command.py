"""`peft estimate` and `--dry-run` on every recipe without network or samples, and what they print."""

from __future__ import annotations

import json
import socket

import pytest
from typer.testing import CliRunner

from peftcli.cli.main import app
from peftcli.config.catalog import recipes
from peftcli.config.compose import compose

ALIKE = {r for r in recipes() if r.startswith(("mamba/", "resnet/", "vit/"))} - {
    "mamba/glue-rte_sdt", "mamba/glue-rte_lora", "mamba/dart_sdt", "mamba/spider_lora", "vit/elpv_lora",
    "resnet/elpv_sparse_adapter",
}  # fmt: skip
"""Recipes that differ from another one in rows and rates alone."""
SAMPLED = "smollm2/reuters-r8_lora"
"""A recipe whose rows are fetched."""


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No samples, no network, an empty folder."""
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def refuse(*args, **kwargs):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def run(*args: str, code: int = 0):
    done = CliRunner().invoke(app, list(args))
    assert done.exit_code == code, done.output + repr(done.exception)
    return done


@pytest.mark.parametrize("recipe", [pytest.param(r, marks=pytest.mark.slow) if r in ALIKE else r for r in recipes()])
def test_every_recipe_is_counted(recipe: str, tmp_path) -> None:
    config = compose(recipe).config
    found = json.loads(run("train", recipe, "--dry-run", "--json").stdout)
    whole = config.method.name == "full" or getattr(config.method, "mode", "") in ("tie", "compress")
    trained, total = found["parameters"]["trainable"], found["parameters"]["total"]
    assert (0 < trained <= total) or (config.method.name == "frozen" and not trained)
    assert whole == (trained == total)
    assert found["memory"]["heaviest"]["peak"] > found["memory"]["heaviest"]["weights"] > 0
    # Rows that are not on this machine are counted as full; the bundled ones are read, pictures are of one size.
    texts, tasks = config.task.type != "images", config.task.type == "episodes"
    assert any("max_length" in note for note in found["notes"]) == (texts and not tasks and recipe != "quickstart")
    assert any("the largest that task.* allows" in note for note in found["notes"]) == tasks
    assert not (tmp_path / "runs").exists()


def test_plain_words_where_there_is_no_terminal() -> None:
    said = run("estimate", SAMPLED).stdout
    assert "fits into the" in said
    assert "134,975,808" in said
    assert "460,800 (0.34 %)" in said
    assert "sample reuters-r8 (data) is not fetched" in said
    assert "rows x tokens, learnt" in said
    assert "\x1b" not in said
    assert max(map(len, said.splitlines())) <= 120


def test_pictures_are_counted_by_their_side() -> None:
    said = run("estimate", "vit/elpv_lora").stdout
    assert "pictures x pixels a side" in said
    assert "32 x 112" in said
    assert "token" not in said
    assert json.loads(run("estimate", "vit/elpv_lora", "--json").stdout)["unit"] == "pixels"


def test_what_does_not_fit_comes_with_changes(monkeypatch) -> None:
    from peftcli.training import estimate

    monkeypatch.setattr(estimate, "_free", lambda device: 10**8)
    said = run("estimate", "quickstart", "model.shape.num_hidden_layers=2").stdout
    assert "does not fit" in said
    found = json.loads(run("estimate", "quickstart", "model.shape.num_hidden_layers=2", "--json").stdout)
    assert found["changes"]
    assert all(entry["peak"] < found["peak"] for entry in found["changes"])


def test_a_change_that_saves_nothing_is_not_named_and_a_large_adapter_becomes_smaller(monkeypatch) -> None:
    from peftcli.training import estimate, out_of_memory

    monkeypatch.setattr(estimate, "_free", lambda device: 10**9)
    real = out_of_memory.candidates
    nothing = lambda config: [out_of_memory.Change(("seed=1",), "nothing", config), *real(config)]  # noqa: E731
    monkeypatch.setattr(out_of_memory, "candidates", nothing)
    args = ("model.shape.num_hidden_layers=2", "method.r=16384", "task.max_length=64")
    found = json.loads(run("estimate", "quickstart", *args, "--json").stdout)
    changes = [entry["change"] for entry in found["changes"]]
    assert changes[0].startswith("method.r=")
    assert found["changes"][0]["peak"] < 0.8 * found["peak"]
    assert not any("seed=1" in change for change in changes)


def test_no_part_of_the_memory_is_below_zero_and_they_add_up() -> None:
    for recipe in (("quickstart",), ("quickstart", "method=full")):
        held = json.loads(run("estimate", *recipe, "--json").stdout)["memory"]["heaviest"]
        parts = ("weights", "adapter", "gradients", "optimiser", "activations", "temporaries", "holes")
        assert all(held[part] >= 0 for part in (*parts, "apart"))
        assert sum(held[part] for part in parts) - held["apart"] == held["peak"]


def test_gradient_checkpointing_is_named_where_it_helps(monkeypatch) -> None:
    from peftcli.training import estimate

    monkeypatch.setattr(estimate, "_free", lambda device: 10**8)
    said = run("estimate", "quickstart", "model.shape.num_hidden_layers=2").stdout
    assert "training.gradient_checkpointing=true" in said


def test_a_price_needs_the_hours() -> None:
    assert "--probe" in run("estimate", "quickstart", "--price", "2", code=2).output


def test_a_probe_needs_the_samples() -> None:
    from peftcli.config.compose import compose
    from peftcli.config.errors import UserError
    from peftcli.training.probe import measure

    with pytest.raises(UserError, match="peft samples fetch"):
        measure(compose(SAMPLED).config)
