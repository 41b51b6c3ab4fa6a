"""What the figures of rowcol's evidence rest on: magnitude pruning to a count, metrics of rows, verdicts."""

from __future__ import annotations

import evidence_rowcol
import evidence_smaller
import numpy as np
import pytest
import torch

from peftcli.methods.rowcol import costing
from peftcli.methods.rowcol.settings import Settings
from peftcli.testing import tiny
from peftcli.testing.rows import train


@pytest.mark.parametrize("made", [tiny.vit, tiny.resnet, tiny.llama])
def test_pruning_leaves_as_many_numbers_as_the_target_says_and_zeros_stay(made) -> None:
    base = made(torch.float32)
    whole = costing.backbone(base.model, base.family)
    method = evidence_smaller.Magnitude(Settings(mode="compress", target={"parameters": "60%"}))
    model = method.attach(base.model, base.family)
    zeros = sum(int((~mask).sum()) for _, mask in method._masks)
    assert whole - zeros == pytest.approx(0.6 * whole, abs=1)
    train(model, method, base)
    assert all(not weight[~mask].any() for weight, mask in method._masks)


def runs(lead: float) -> list[dict]:
    truth = np.array([1] * 30 + [0] * 30)
    hard = np.random.default_rng(1).normal(size=60)
    return [
        {"after": {"values": (hard + lead * truth + 0.1 * seed).tolist(), "truth": truth.tolist()}} for seed in range(3)
    ]


def test_a_lead_is_seen_and_no_lead_is_none() -> None:
    assert evidence_rowcol.difference(runs(1), runs(1)) == (0, 0, 0)
    gap, low, high = evidence_rowcol.difference(runs(2), runs(0))
    assert 0 < low < gap < high
    shares = [{"after": {"values": [1, 0, 1, 1]}, "before": {"values": [0, 0, 1, 1]}}] * 3
    gap, _, _ = evidence_rowcol.difference(shares, shares, "before")
    assert gap == pytest.approx(0.25)
    assert evidence_smaller.mean(shares[0]["after"]) == 0.75


@pytest.mark.parametrize(
    ("gap", "said"), [((0, -0.019, 0.1), "not worse"), ((0, -0.03, 0), "not shown"), ((0, -0.09, -0.03), "worse")]
)
def test_two_points_by_the_interval(gap, said) -> None:
    assert evidence_rowcol.verdict(gap) == said


def test_the_grid_names_every_run_once(tmp_path) -> None:
    bench = evidence_rowcol.Bench(tmp_path, full=False)
    bench.store.results = {f"vit/original/{rate:g}/0": {"validation": rate} for rate in evidence_rowcol.RATES}
    jobs = [
        bench.arm("vit", arm, share, seed) for arm in evidence_rowcol.ARMS for share in (50, 75) for seed in range(3)
    ]
    assert len(dict(jobs)) == len(jobs)
    assert bench.rate("vit") == max(evidence_rowcol.RATES)
    assert not bench.has_adapters("vit")
