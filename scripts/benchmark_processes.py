"""What several processes cost and bring: throughput, share of time in communication, bytes sent a step.

    python scripts/benchmark_processes.py [--steps 12] [--to FILE.json]

Trains the recipe `quickstart` on this machine's CPU a few steps at a time: one process of two threads, two processes of
one thread under DDP and under FSDP, with adapters of several sizes. Bytes and seconds of communication come from a pass
of their own, in which every collective is waited for at once: without overlap, so that the share is an upper bound.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from peftcli.artifacts.run_folder import RunFolder
from peftcli.config.compose import compose

WARM = 3
"""Steps that are not counted."""
CASES: dict[str, tuple[int, list[str]]] = {
    "1 process x 2 threads, lora r=8": (1, ["method.r=8", "launch.threads=2"]),
    "2 processes x 1 thread, ddp, lora r=2": (2, ["method.r=2"]),
    "2 processes x 1 thread, ddp, lora r=8": (2, ["method.r=8"]),
    "2 processes x 1 thread, ddp, lora r=32": (2, ["method.r=32"]),
    "2 processes x 1 thread, fsdp, lora r=8": (2, ["method.r=8", "launch.strategy=fsdp"]),
    "1 process x 2 threads, full": (1, ["method=full", "optim.lr=1e-5", "launch.threads=2"]),
    "2 processes x 1 thread, ddp, full": (2, ["method=full", "optim.lr=1e-5"]),
    "2 processes x 1 thread, fsdp, full": (2, ["method=full", "optim.lr=1e-5", "launch.strategy=fsdp"]),
}


def main() -> None:
    """Run all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--to", type=Path)
    given = parser.parse_args()
    found = {name: measured(*case, given.steps) for name, case in CASES.items()}
    print(f"{'':44}{'rows/s':>9}{'step, s':>9}{'trained':>11}{'sent, bytes':>13}{'messages':>9}{'in them':>9}")
    for name, row in found.items():
        print(
            f"{name:44}{row['rows_per_second']:9.1f}{row['step_seconds']:9.3f}{row['trained']:11,}"
            f"{row['sent_bytes']:13,}{row['messages']:9}{row['communication']:9.1%}"
        )
    if given.to:
        given.to.write_text(json.dumps(found, indent=2) + "\n")


def measured(processes: int, overrides: list[str], steps: int) -> dict[str, Any]:
    """A case: its speed from one run, what it sends from another."""
    with tempfile.TemporaryDirectory() as place:
        plain = _run(processes, overrides, steps, Path(place), counted=False)
        sent = _run(processes, overrides, steps, Path(place), counted=True) if processes > 1 else plain
    step = median(plain["seconds"])
    return {
        "rows_per_second": median(rows / s for rows, s in zip(plain["rows"], plain["seconds"], strict=True)),
        "step_seconds": step,
        "trained": plain["trained"],
        "sent_bytes": int(median(sent["bytes"])),
        "messages": int(median(sent["messages"])),
        "communication": median(sent["waited"]) / step,
    }


def _run(processes: int, overrides: list[str], steps: int, place: Path, counted: bool) -> dict[str, Any]:
    import torch.multiprocessing as several

    given = [*overrides, f"training.max_steps={steps}", "training.eval_every=end", "training.baselines=false"]
    given += ["launch.device=cpu", f"launch.processes={processes}", "training.save_every=1000", f"output={place}"]
    config = compose("quickstart", given).config
    config = replace(config, data=replace(config.data, rows={**config.data.rows, "validation": 8, "test": 8}))
    folder = RunFolder.create(config).path
    several.spawn(_worker, (processes, str(folder), counted), nprocs=processes)
    return json.loads((folder / "counted.json").read_text())  # type: ignore[no-any-return]


def _worker(rank: int, processes: int, folder: str, counted: bool) -> None:
    if processes > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"} | {k: str(v) for k, v in names.items()}
    import torch.distributed as dist
    from torch.distributed import Work
    from torch.utils._python_dispatch import TorchDispatchMode

    from peftcli.training import loop
    from peftcli.training.run import run

    book: dict[str, Any] = {"bytes": [], "messages": [], "waited": [], "seconds": [], "rows": []}

    class Counting(TorchDispatchMode):
        """Waits for each collective, and adds up what it takes and sends."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace != "c10d":
                return func(*args, **(kwargs or {}))
            began = time.perf_counter()
            found = func(*args, **(kwargs or {}))
            if func._opname != "barrier":
                Work.unbox(found[-1] if isinstance(found, tuple | list) else found).wait()
            book["waited"][-1] += time.perf_counter() - began
            book["messages"][-1] += 1
            book["bytes"][-1] += _sent(func._opname, args, processes)
            return found

    step = loop.StageLoop._step

    def noted(self: Any) -> Any:
        for name in ("bytes", "messages", "waited"):
            book[name].append(0)
        began = time.perf_counter()
        if counted:
            with Counting():
                row, asked = step(self)
        else:
            row, asked = step(self)
        book["seconds"].append(time.perf_counter() - began)
        book["rows"].append(row["rows"])
        book["trained"] = sum(parameter.numel() for parameter in self.names)
        return row, asked

    loop.StageLoop._step = noted  # type: ignore[method-assign]
    if processes > 1:
        meeting = f"file://{folder}/meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    run(Path(folder), quiet=True)
    if rank == 0:
        kept = {name: value[WARM:] if isinstance(value, list) else value for name, value in book.items()}
        (Path(folder) / "counted.json").write_text(json.dumps(kept))


def _sent(name: str, args: Any, processes: int) -> int:
    """Bytes that a process sends in a collective, as the usual ring or exchange does it."""
    import torch

    def size(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.nbytes
        return sum(map(size, value)) if isinstance(value, list | tuple) else 0

    others = processes - 1
    if name.startswith("allreduce"):
        return 2 * size(args[0]) * others // processes
    if "allgather" in name:  # outputs first: the whole
        return size(args[0]) * others // processes
    if "reduce_scatter" in name:
        return size(args[1]) * others // processes
    return size(args[0])


if __name__ == "__main__":
    main()
