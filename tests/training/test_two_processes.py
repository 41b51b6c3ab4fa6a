"""Every method on two processes: the same tensors on both, and the curve of one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from peftcli.artifacts.run_folder import RunFolder
from peftcli.config.errors import UserError
from peftcli.methods import registry
from peftcli.methods.full.settings import Settings as Full
from peftcli.methods.kpsvd.settings import Settings as Kpsvd
from peftcli.methods.linear_probe.settings import Settings as Probe
from peftcli.methods.lora.settings import Settings as Lora
from peftcli.methods.peft.settings import Settings as Peft
from peftcli.methods.rowcol.settings import Settings as Rowcol
from peftcli.methods.sdt.settings import Settings as Sdt
from peftcli.methods.smat.settings import Settings as Smat
from peftcli.methods.sparse_adapter.settings import Settings as Sparse
from peftcli.training import sharding
from tests import few_shot, together
from tests.runs import make_run

pytestmark = pytest.mark.slow
REFUSED = {"lora-pissa": "init=default", "kpsvd": "base=delta", "smat": "launch.strategy=ddp"}
"""Those that FSDP may not cut the base of, and what they say."""
STEPS = {"max_steps": 6, "batch_size": 7, "eval_every": 3, "save_every": 3}
"""Seven rows are an unequal share of two, and no two of like length."""
SPARSE: dict[str, Any] = {"r": 4, "dropout": 0.0, "sparsity": 0.5, "few": 0.25, "final": 0.25, "guard": 1.0}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": Lora(r=2, dropout=0.0)},
    "lora-dora": {"method": Lora(r=2, dropout=0.0, use_dora=True)},
    "lora-pissa": {"method": Lora(r=2, dropout=0.0, init="pissa")},
    "adalora": {"method": Peft(type="ADALORA", args={"init_r": 3, "target_r": 2, "lora_dropout": 0.0})},
    "linear_probe": {"method": Probe(), "task": {"head": "linear"}},
    "full": {"method": Full(), "optim": {"lr": 1e-3}},
    "full-head-first": {"method": Full(head_first=0.5), "optim": {"lr": 1e-3}, "task": {"head": "linear"}},
    "kpsvd": {"method": Kpsvd(rank=3)},
    "kpsvd-delta": {"method": Kpsvd(rank=3, base="delta")},
    "rowcol": {"method": Rowcol(rank=4)},
    "rowcol-tie": {"method": Rowcol(mode="tie"), "optim": {"lr": 1e-3}},
    "sparse-unit": {"method": Sparse(**SPARSE, structure="unit", importance="first_order")},
    "sparse-weight": {"method": Sparse(**SPARSE, structure="weight", importance="fisher", l1=1e-3)},
    "sdt-taylor": {"method": Sdt(channels=2, states=2), "base": "mamba"},
    "sdt-magnitude": {"method": Sdt(selector="magnitude", channels=2, states=2, warmup=2), "base": "mamba"},
    "sdt-abar": {"method": Sdt(selector="abar", channels=2, states=2, warmup=2), "base": "mamba"},
    "smat": {"method": Smat(experts=1, sparsity=0.5), "base": "pictures"},
}


@pytest.fixture(scope="module")
def make(checkpoint, mamba_folder, rows, tmp_path_factory):
    """`make(row, processes=2)` is a run folder of a row of `METHODS`."""
    from tests import pictures

    place = tmp_path_factory.mktemp("together")
    domains = {
        name: few_shot.domain(few_shot.make_domain(place / name, 12, 6, seed)) for seed, name in enumerate("ab")
    }
    vit = pictures.make_checkpoint(place / "vit", "vit")

    def of(name: str, **launch: Any) -> RunFolder:
        row = dict(METHODS[name])
        base = row.pop("base", "llama")
        launch = {"timeout_minutes": 0.5, **launch}
        if base == "pictures":
            return few_shot.make_run(vit, domains, place / "runs", launch=launch, **row)
        folder = checkpoint if base == "llama" else mamba_folder
        return make_run(folder, rows, place / "runs", training=STEPS, launch=launch, **row)

    return of


@pytest.fixture(scope="module")
def alone(make) -> dict[str, RunFolder]:
    """Each method on one process."""
    return _session(make, 1)


@pytest.fixture(scope="module")
def ddp(make) -> dict[str, RunFolder]:
    """Each method on two."""
    return _session(make, 2)


def _session(make, world: int, names=METHODS, **launch: Any) -> dict[str, RunFolder]:
    runs = {name: make(name, processes=world, **launch) for name in names}
    place = next(iter(runs.values())).path
    together.train(runs.values(), place.with_name(f"{place.name}-meeting"), place.parents[2] / "cache", world)
    return runs


def losses(run: RunFolder) -> list[float]:
    return [row["loss"] for row in run.metrics() if "loss" in row]


def validated(run: RunFolder) -> list[float]:
    return [row["validation"]["loss"] for row in run.metrics() if "validation" in row]


def assert_same_on_both(run: RunFolder) -> None:
    (one, about), (two, _) = (together.held(run, rank) for rank in (0, 1))
    assert about["world"] == 2
    assert about["trained"]
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def assert_curve(run: RunFolder, other: RunFolder) -> None:
    assert len(losses(run)) == len(losses(other)) > 4
    assert losses(run) == pytest.approx(losses(other), rel=2e-3)
    assert validated(run) == pytest.approx(validated(other), rel=5e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_what_may_not_be_cut_up_says_why(name) -> None:
    method = METHODS[name]["method"]
    with pytest.raises(UserError, match=REFUSED[name]):
        sharding.check(registry.find(method.name)(method), method.name)


@pytest.mark.parametrize("name", METHODS)
def test_both_processes_of_ddp_hold_the_same_and_follow_one(name, alone, ddp) -> None:
    assert_same_on_both(ddp[name])
    assert ddp[name].status == "done"
    assert_curve(ddp[name], alone[name])


@pytest.fixture(scope="module")
def fsdp(make) -> dict[str, RunFolder]:
    """Each method that may on two processes that have a part of the base each."""
    return _session(make, 2, [name for name in METHODS if name not in REFUSED], strategy="fsdp")


@pytest.mark.parametrize("name", [name for name in METHODS if name not in REFUSED])
def test_both_processes_of_fsdp_hold_the_same_and_follow_one(name, alone, fsdp) -> None:
    assert_same_on_both(fsdp[name])
    assert fsdp[name].status == "done"
    assert_curve(fsdp[name], alone[name])
    assert_cut_up(fsdp[name])


def assert_cut_up(run: RunFolder) -> None:
    """Every tensor of the base is in two parts; what an adapter adds is whole, what a whole model learns is not."""
    halves = [together.held(run, rank)[1]["shapes"] for rank in (0, 1)]
    adapts = run.adapter.is_dir()
    trained = set(together.held(run, 0)[1]["trained"])
    for name, (part, whole) in halves[0].items():
        other = halves[1][name][0]
        if adapts and name in trained:
            assert part == other == whole, name
        elif part != whole:
            assert part[0] + other[0] == whole[0] and part[1:] == other[1:] == whole[1:], name
    there = [sum(math.prod(part) for part, _ in half.values()) for half in halves]
    assert max(there) < 0.75 * sum(math.prod(whole) for _, whole in halves[0].values())
