"""Runs of several processes that are started once for many runs, and what each process held at the end of each."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peftcli.artifacts.run_folder import RunFolder
from tests.forkserver import server

PATIENCE = 400.0


def train(runs: Iterable[RunFolder], meeting: Path, cache: Path, world: int = 2) -> None:
    """Train these runs one after the other in the same processes; `held` tells what each was left with.

    Args:
        runs: Their folders, with `launch.processes` equal to `world`.
        meeting: A folder in which the processes find one another.
        cache: The tests' own.
        world: How many.
    """
    meeting.mkdir(parents=True, exist_ok=True)
    paths = [run.path for run in runs]
    members = [server.Process(target=_member, args=(rank, world, paths, meeting, str(cache))) for rank in range(world)]
    for member in members:
        member.start()
    for member in members:
        member.join(PATIENCE)
        if member.exitcode is None:
            member.kill()


def held(run: RunFolder, rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a process was left with: its tensors by name, and notes of the loop; raises what went wrong in it."""
    from safetensors.torch import load_file

    place = run.path / f"process{rank}"
    if (failed := place.with_suffix(".failed")).exists():
        raise AssertionError(failed.read_text())
    return load_file(place.with_suffix(".safetensors")), json.loads(place.with_suffix(".json").read_text())


def _member(rank: int, world: int, folders: list[Path], meeting: Path, cache: str) -> None:
    os.environ["PEFTCLI_CACHE"] = cache
    if world > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": 0}
        os.environ |= {"MASTER_ADDR": "localhost"} | {name: str(value) for name, value in names.items()}
    import torch.distributed as dist
    from accelerate.state import AcceleratorState

    from peftcli.training import run

    run.train = _noted(run.train)  # type: ignore[attr-defined]
    for folder in folders:
        AcceleratorState._reset_state(reset_partial_state=True)
        if world > 1:
            where = f"file://{meeting}/{folder.name}"
            dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world)
        try:
            run.run(folder, quiet=True)
        except BaseException:
            (folder / f"process{rank}.failed").write_text(traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _noted(train: Any) -> Any:
    from safetensors.torch import save_file
    from torch import nn

    from peftcli.training import sharding

    def noted(job: Any, resumed: Any) -> Any:
        progress, trained = train(job, resumed)
        model: nn.Module = job.model
        tensors = {name: t for name, t in [*model.named_parameters(), *model.named_buffers()] if name in trained}
        tensors |= {f"state/{name}": t for name, t in job.method.state(model).items()}
        place = job.run.path / f"process{job.accelerator.process_index}"
        tensors = {name: sharding.whole(t.detach()).clone().contiguous() for name, t in tensors.items()}
        save_file(tensors, place.with_suffix(".safetensors"))
        about = {"world": job.accelerator.num_processes, "steps": progress.step, "trained": sorted(trained)}
        about["shapes"] = {n: (tuple(sharding.part(p.detach()).shape), tuple(p.shape)) for n, p in model.named_parameters()}
        place.with_suffix(".json").write_text(json.dumps(about))
        return progress, trained

    return noted
