"""KPSVD through whole runs, killed and resumed: ranks by calibration rows, both bases, the gradient as source."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from peftcli.artifacts.run_folder import RunFolder
from peftcli.config import frozen
from peftcli.methods.kpsvd.settings import Settings as Kpsvd
from peftcli.training import checkpoints
from tests.runs import make_run
from tests.training.test_resume import assert_same

KINDS = {
    "residual": {"method": Kpsvd(rank="auto", max_rank=6)},
    "delta": {"method": Kpsvd(rank=2, base="delta", sigma="trained", source="gradient", alpha=4.0)},
}
TIMES = {"training": {"eval_every": 3, "save_every": 1}}


@pytest.fixture(scope="module", params=list(KINDS))
def whole(request, checkpoint: Path, rows: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run that is killed below, undisturbed."""
    from peftcli.training.run import run

    folder = make_run(checkpoint, rows, tmp_path_factory.mktemp("whole"), **KINDS[request.param], **TIMES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTCLI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        run(folder.path, quiet=True)
    return folder


@pytest.mark.parametrize(("event", "at", "step"), [("log", 4, 2), ("log", 7, 5), ("tensors", 10, 3)])
def test_a_killed_run_resumes_bit_for_bit(make_run, whole, train, event, at, step) -> None:
    run = make_run(method=frozen.load(whole.config).method, **TIMES)
    assert train(run, event, at) == -signal.SIGKILL
    assert checkpoints.latest(run.checkpoints).progress.step == step
    assert train(run) == 0
    assert_same(run, whole)
    resumed, report = run.read_report(), whole.read_report()
    assert resumed["figures"] == report["figures"]
    assert resumed["data"]["notes"] == report["data"]["notes"]
