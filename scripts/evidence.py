"""What evidence scripts share: runs that are kept as they come, intervals, and tables in a method's README.

A run is named by a key. Its result is appended to a file, so that a script which is started again goes on; figures are
made from that file alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from peftcli.config.schema import RunConfig
    from peftcli.training.loop import Job
    from peftcli.training.prepare import Attached, Material

DRAWS = 10_000
"""Bootstrap samples."""
Result = dict[str, Any]
Jobs = Mapping[str, tuple[Any, ...]]


class Store:
    """Results by key, in a file of one JSON line each."""

    def __init__(self, path: Path):
        self.path = path
        self.results: dict[str, Result] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                with suppress(json.JSONDecodeError):  # the line that a kill cut short
                    row = json.loads(line)
                    self.results[row.pop("key")] = row

    def add(self, key: str, result: Result) -> None:
        self.results[key] = result
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps({"key": key, **result}) + "\n")

    def run(self, jobs: Jobs, workers: int, work: Callable[..., Result] | None = None, fresh: bool = False) -> None:
        """Do the jobs that have no result yet, each in one thread of a process beside this one.

        Args:
            jobs: What to call `work` with, by key.
            workers: Processes at a time.
            work: `measure`, or another function of a module.
            fresh: Each job has a process of its own.
        """
        left = {key: job for key, job in jobs.items() if key not in self.results}
        began, done = time.monotonic(), 0
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=spawn, max_tasks_per_child=1 if fresh else None) as pool:
            futures = {pool.submit(work or measure, *job): key for key, job in left.items()}
            for future in as_completed(futures):
                self.add(futures[future], future.result())
                done += 1
                rate = (time.monotonic() - began) / done
                print(
                    f"{done}/{len(left)} {futures[future]}, {rate * (len(left) - done) / 60:.0f} min left", flush=True
                )


@dataclass
class Prepared:
    """A run that `peft train` would start now."""

    job: Job
    material: Material
    attached: Attached
    began: float
    """`time.perf_counter()` before the adapter went in."""
    attach_seconds: float


class _Rows:
    """A config that is equal to another one of the same key, whose rows are the same."""

    def __init__(self, config: Any, key: str):
        self.config, self.key = config, key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Rows) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@lru_cache(4)
def _read(rows: _Rows) -> Material:
    from peftcli.training import prepare

    return prepare.load_material(rows.config)


def material_of(config: RunConfig, reader: Any = None) -> Material:
    """The rows of a config as `prepare.load_material` gives them, read once for all runs of a process.

    Args:
        config: The run's.
        reader: What tells how rows are read; None takes the whole model group.
    """
    return _read(_Rows(config, repr((config.data, config.task, reader or config.model))))


@contextmanager
def prepared(
    recipe: str, overrides: Sequence[str], load: Callable[[RunConfig], Material] | None = None
) -> Iterator[Prepared]:
    """A recipe up to its first step, in a folder that is gone afterwards.

    Args:
        recipe: Its name.
        overrides: What is not as it says.
        load: Gives the rows, in place of `prepare.load_material`.
    """
    from peftcli.artifacts.run_folder import RunFolder
    from peftcli.config.compose import compose
    from peftcli.training import loop, prepare
    from peftcli.training.display import Display
    from peftcli.training.signals import StopRequest

    with tempfile.TemporaryDirectory() as folder:
        config = compose(recipe, [*overrides, f"output={folder}"]).config
        prepare.use_cores(config.launch)
        accelerator = prepare.build_accelerator(config)
        material = (load or prepare.load_material)(config)
        loaded = prepare.load_model(config, material, accelerator)
        feed, steps = prepare.build_feed(config, material, accelerator)
        began = time.perf_counter()
        attached = prepare.attach(config, loaded, material, feed, steps, accelerator)
        attach_seconds = time.perf_counter() - began
        run = RunFolder.create(config)
        job = loop.Job(
            config, attached.model, attached.method, material.task, feed, steps, accelerator, run,
            Display(run.log_file, steps, quiet=True), StopRequest(),
        )  # fmt: skip
        yield Prepared(job, material, attached, began, attach_seconds)


def trained(model: Any) -> int:
    """The number of trained parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def measure(recipe: str, overrides: list[str]) -> Result:
    """Train a recipe through the parts of `peft train` and answer its test rows.

    Returns:
        `correct` (a string of 0 and 1, a character a test row in the order of the rows), `validation` (a share),
        `trained` parameters, `seconds` of attaching and training, `attach_seconds`, and by layer the `channels` that
        SDT chose.
    """
    from peftcli.training import closing, loop

    with prepared(recipe, overrides) as found:
        job, material = found.job, found.material
        loop.train(job)
        count, seconds = trained(job.model), time.perf_counter() - found.began
        job.method.finish(job.model)
        assert material.validation is not None
        validation = closing.Measurer(material, material.validation, job.config, job.accelerator)(job.model)
        answers = closing.evaluate(job.model, material, job.config, job.accelerator).examples
    in_order = sorted(answers, key=lambda answer: answer["row"])
    return {
        "correct": "".join(str(int(answer["correct"])) for answer in in_order),
        "validation": validation["accuracy"],
        "trained": count,
        "seconds": round(seconds, 2),
        "attach_seconds": round(found.attach_seconds, 2),
        "channels": _chosen(job.model),
    }


def _chosen(model: Any) -> dict[str, list[int]]:
    chosen = {name: module.sdt_channels for name, module in model.named_modules() if hasattr(module, "sdt_channels")}
    return {name: kept["default"].tolist() for name, kept in chosen.items() if "default" in kept}


def answers(results: Sequence[Result]) -> np.ndarray:
    """[runs, test rows], 1 where a run's answer is right."""
    return np.array([[int(mark) for mark in result["correct"]] for result in results], dtype=float)


def points(gap: tuple[float, float, float]) -> str:
    """A difference of shares and the ends of its interval, in points of a hundred."""
    middle, low, high = (100 * share for share in gap)
    return f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"


def difference(ours: np.ndarray, theirs: np.ndarray, draws: int = DRAWS) -> tuple[float, float, float]:
    """Mean difference of two arms' shares of right answers, with its 95 % interval.

    Both arms' runs [seeds, rows] are paired: a bootstrap sample draws seeds and test rows anew, the same for both.
    """
    gaps = ours - theirs
    seeds, rows = gaps.shape
    generator = np.random.default_rng(0)
    drawn_seeds = generator.multinomial(seeds, [1 / seeds] * seeds, size=draws) / seeds
    drawn_rows = generator.multinomial(rows, [1 / rows] * rows, size=draws) / rows
    means = np.einsum("ds,sr,dr->d", drawn_seeds, gaps, drawn_rows, optimize=True)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(gaps.mean()), float(low), float(high)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def here(command: str) -> str:
    """What made the figures: command, machine, versions, date."""
    import torch

    machine = f"{multiprocessing.cpu_count()} cores of {_processor()}, torch {torch.__version__}"
    return f"`{command}`, {date.today():%d %B %Y}, {machine}"


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_between(path: Path, marker: str, text: str) -> None:
    """Replace what stands between `<!-- marker -->` and `<!-- /marker -->` in a file."""
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{path} has no {begin} ... {end}")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def command(
    about: str,
    bench: Callable[[Path, bool], Any],
    run: Callable[[Any, int], None],
    report: Callable[[Any], str],
    readme: Path,
) -> None:
    """The command line of an evidence script: run what has no result yet, or write the tables.

    Args:
        about: The script's docstring.
        bench: Builds what the other two work with, from the folder of results and whether the size is the full one.
        run: Takes it and a number of worker processes.
        report: The text between the marks of the README.
        readme: The method's.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--out", type=Path, default=Path("build"))
    parser.add_argument("--size", choices=["small", "full"], default="small")
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    made = bench(asked.out.resolve(), asked.size == "full")
    if asked.what == "run":
        run(made, asked.workers)
    else:
        write_between(readme, "evidence", report(made))
