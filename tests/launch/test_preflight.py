"""A process that does not come is named, with the place where it was last seen; what differs between two is named."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import torch

from peftcli.config.errors import CheckFailed
from peftcli.training import preflight
from tests.forkserver import server


def _member(rank: int, folder: Path, late: float) -> None:
    import torch.distributed as dist

    where, patience = f"file://{folder}/meeting", timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2, timeout=patience)
    places = preflight.Places(rank, 2)
    said = []
    places.at("reading the rows")
    if rank and late:
        time.sleep(late)
        return
    for ask in (
        lambda: preflight.all_reduce(places, torch.device("cpu"), 1.0),
        lambda: preflight.agree(places, "the rows", "same"),
        lambda: preflight.agree(places, "the rows", "same" if rank == 0 else "other"),
    ):
        try:
            ask()
            said.append("")
        except CheckFailed as error:
            said.append(error.what)
            if late:
                break
    (folder / f"said{rank}").write_text("\n".join(said))


def _meet(folder: Path, late: float) -> list[str]:
    members = [server.Process(target=_member, args=(rank, folder, late)) for rank in (0, 1)]
    for member in members:
        member.start()
    for member in members:
        member.join(100)
    return (folder / "said0").read_text().split("\n")


def test_a_process_that_does_not_come_is_named(tmp_path: Path) -> None:
    [said] = _meet(tmp_path, late=4.0)
    assert "wait for one another in vain" in said
    assert "rank 1 (" in said and ": reading the rows)" in said
    assert "rank 0 (here" in said and "the first all-reduce)" in said


def test_what_differs_is_named(tmp_path: Path) -> None:
    first, second, third = _meet(tmp_path, late=0.0)
    assert first == second == ""
    assert "the rows differ between processes (rank 0: same, rank 1: other)" in third
