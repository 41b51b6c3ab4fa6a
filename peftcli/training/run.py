"""A run, from its folder to its report: prepare, check, train, measure, save, tell."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout

from peftcli.artifacts import atomic
from peftcli.artifacts.run_folder import RunFolder
from peftcli.config import frozen
from peftcli.config.errors import CheckFailed, UserError
from peftcli.config.schema import RunConfig
from peftcli.models import packed
from peftcli.reports import units
from peftcli.tasks.contract import Evaluation
from peftcli.training import (
    beginning,
    checkpoints,
    checks,
    closing,
    costs,
    memory,
    out_of_memory,
    preflight,
    prepare,
    sharding,
    trackers,
    trials,
)
from peftcli.training.checkpoints import Checkpoint, Progress
from peftcli.training.display import Display
from peftcli.training.loop import Job, train
from peftcli.training.prefix import Prefix
from peftcli.training.preflight import Places, agree
from peftcli.training.prepare import Attached, Material
from peftcli.training.signals import Stopped, StopRequest


def run(folder: Path, quiet: bool = False) -> dict[str, Any]:
    """Train the run in a folder to its end, from its newest checkpoint where it has one.

    Args:
        folder: A run folder with its frozen config.
        quiet: Nothing on the screen but mistakes.

    Returns:
        The report; `report["run"]["status"]` is `done` or `stopped`. Processes other than the first return `{}`.

    Raises:
        UserError: A mistake that shows only with the data or the model at hand.
        CheckFailed: A named check stopped the run; the report says which.
    """
    run = RunFolder.open(folder)
    config = frozen.load(run.config)
    prepare.use_cores(config.launch)
    accelerator = prepare.build_accelerator(config, run.path)
    display = Display(run.log_file, speaks=accelerator.is_main_process, quiet=quiet)
    session = _Session(run, config, accelerator, display)
    try:
        preflight.all_reduce(session.places, accelerator.device, config.launch.preflight_seconds)
        with (
            StopRequest(patient=config.launch.world > 1) as stop,
            out_of_memory.named(config),
            session.places.named(),
            session.alone(),
        ):
            return session.go(stop)
    except CheckFailed as failure:
        session.failed(failure)
        raise
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        display.close()


class _Session:
    """What the parts of a run share."""

    def __init__(self, run: RunFolder, config: RunConfig, accelerator: Accelerator, display: Display):
        self.run, self.config, self.accelerator, self.display = run, config, accelerator, display
        self.began = psutil.Process().create_time()
        self.main = accelerator.is_main_process
        self.places = Places(accelerator.process_index, accelerator.num_processes)
        self.checks: list[dict[str, Any]] = []
        self.trials: list[trials.Trial] = []

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within it no other `peft train --resume` works in this run folder.

        Raises:
            UserError: One does.
        """
        if not self.main:
            yield
            return
        place = self.run.path / ".lock"
        lock = FileLock(place)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{self.run.path} is being trained by another process; wait for it, or end it") from None
        except OSError as error:
            raise atomic.explain(error, place) or error from error
        try:
            yield
        finally:
            lock.release()

    def go(self, stop: StopRequest) -> dict[str, Any]:
        """All of it."""
        resumed = checkpoints.latest(self.run.checkpoints)
        try:
            material, attached, job = self._prepare(stop, resumed)
            if resumed:
                self.display.say(f"continuing after step {resumed.progress.step}")
            before = checks.fingerprints(attached.model)
            agree(self.places, "the frozen tensors", checks.combined(before))
            if self.main:
                beginning.same_base(self.run, before, resumed)
                self.run.become_latest()
            if job.sharded:
                self._shard(attached)
                before = checks.fingerprints(attached.model)
            progress, trained = train(job, resumed)
            self._check_frozen(before, attached, trained)
            self._note_peak()
            if not job.sharded:
                self._leave_group()
            return self._finish(material, attached, job, progress) if self.main or job.sharded else {}
        except Stopped:
            self.display.say(f"stopped by {stop.name or 'a signal to another process'}; what is done is on disk")
            return self._stopped(stop.name)

    def _prepare(self, stop: StopRequest, resumed: Checkpoint | None) -> tuple[Material, Attached, Job]:
        self.places.at("reading the rows")
        with self.accelerator.main_process_first():
            material = prepare.load_material(self.config)
            if self.main:
                beginning.note(self.run, self.config.seed, material.splits.fingerprint, resumed, self.display)
        agree(self.places, "the rows", material.splits.fingerprint)
        if self.accelerator.num_processes == 1:  # several stop together, at a step
            material.task.heed = stop.heed
        self._show(material)
        self.config, self.trials = trials.settle(self.config, material, self.accelerator, self.run, self.display, stop)
        self.places.at("loading the model")
        loaded = prepare.load_model(self.config, material, self.accelerator)
        for note in loaded.notes:
            self.display.say(f"note: {note}")
        self.loaded_bytes = memory.held(self.accelerator.device)
        feed, steps = prepare.build_feed(self.config, material, self.accelerator)
        attached = prepare.attach(self.config, loaded, material, feed, steps, self.accelerator)
        self.checks += attached.checks
        trained = sum(p.numel() for p in attached.model.parameters() if p.requires_grad)
        whole = sum(packed.entries(attached.model).values())
        self.display.say(f"{trained:,} of {whole:,} parameters are trained ({trained / whole:.2%}); {steps} steps")
        self.display.steps = steps
        tracker = trackers.start(self.accelerator, self.config, self.run)
        job = Job(
            self.config, attached.model, attached.method, material.task, feed, steps, self.accelerator, self.run,
            self.display, stop, self._measure(material), tracker, prefix=Prefix(attached.loaded.family),
            places=self.places, sharded=sharding.sharded(self.config),
        )  # fmt: skip
        return material, attached, job

    def _shard(self, attached: Attached) -> None:
        """Cut the model up, and say how much of it is here."""
        accelerator = self.accelerator
        count = accelerator.num_processes
        parts = sharding.shard(attached.model, attached.method, accelerator.device, count, self.config.launch.offload)
        attached.probe = {name: tensor.to(accelerator.device) for name, tensor in attached.probe.items()}
        held, whole = sharding.sizes(attached.model)
        self.display.say(
            f"cut up in {parts} parts: {units.size(held)} of {units.size(whole)} of the model's tensors are in each of "
            f"{count} processes"
        )

    def _show(self, material: Material) -> None:
        """What the model will see, said once: notes, counts, one row with its mask."""
        for note in material.splits.notes:
            self.display.say(f"note: {note}")
        for name, counts in material.counts().items():
            self.display.say(f"{name}: {material.task.told(counts)}")
        first = (
            material.train.take([0])[0]
            if not isinstance(material.train, prepare.Stream)
            else material.task.encode(material.train.head(1)[0], material.tokenizer)
        )
        self.display.say("one row, what is learnt in [[ ]]: " + material.task.show(first, material.tokenizer).plain)
        self.checks.append({"name": "no-trainable-tokens", "passed": True, "detail": "every split has tokens to learn"})

    def _measure(self, material: Material):
        if material.validation is None:
            return None
        return closing.Measurer(material, material.validation, self.config, self.accelerator)

    def _check_frozen(self, before: dict[str, int], attached: Attached, trained: set[str]) -> None:
        compared = checks.frozen_moved(before, attached.model, trained)
        self.checks.append(
            {"name": "frozen-moved", "passed": True, "detail": f"{compared} frozen tensors kept their bits"}
        )

    def _finish(self, material: Material, attached: Attached, job: Job, progress: Progress) -> dict[str, Any]:
        attached.method.finish(attached.model)
        report: dict[str, Any] = {
            "run": {**self._identity("done"), "steps": progress.step, "stopped_early": progress.stopped_early},
            "parameters": closing.parameters(attached),
            "checks": self.checks,
            "figures": [*trials.figures(self.trials), *attached.method.figures(attached.model)],
        }
        self.display.say("training is done; measuring on held-out rows")
        job.heed_stop()
        try:
            tuned = closing.evaluate(attached.model, material, self.config, self.accelerator)
        except Exception:  # whatever stops a measurement (a database, a judge of answers), what was trained is kept
            closing.save(self.run, attached, material, self.config, Evaluation({}), self.main)
            raise
        report["adapter"] = closing.save(self.run, attached, material, self.config, tuned, self.main)
        job.heed_stop()
        if not job.sharded and (forms := attached.method.forms(attached.model)):
            rows, chosen = costs.batches_of(attached.probe), prepare.arithmetic(self.config, self.accelerator)
            report["costs"] = costs.measure(attached.model, forms, rows, chosen, self.accelerator.device)
        start = None
        if progress.step:
            start = closing.at_start(attached, material, self.config, self.accelerator)
        base = closing.untouched(attached, material, self.config, self.accelerator)
        report["quality"], report["examples"] = closing.quality(material, self.config, tuned, base, start)
        report["labels"] = material.task.labels
        report["data"] = {**material.counts(), "notes": self._notes(material, attached, job)}
        report["memory"] = {"loaded_bytes": self.loaded_bytes, "peak_bytes": self._peak()}
        report["time"] = self._times(job, progress)
        report["trials"] = [vars(trial) for trial in self.trials]
        if job.sharded:
            self._leave_group()
        return self._write(report) if self.main else {}

    @staticmethod
    def _notes(material: Material, attached: Attached, job: Job) -> list[str]:
        """What was done with rows, base and adapter that the recipe did not ask for word by word."""
        return [*material.splits.notes, *attached.loaded.notes, *attached.method.notes, *job.prefix.notes]

    def _peak(self) -> int:
        """The most bytes held: on CPUs by all processes together, on GPUs by one."""
        return max(self.peak_in_training, memory.peak(self.accelerator.device))

    def _note_peak(self) -> None:
        """The most that training held, of all processes."""
        accelerator = self.accelerator
        peak = torch.tensor(float(memory.peak(accelerator.device)), dtype=torch.float32, device=accelerator.device)
        if accelerator.num_processes > 1:
            together = (
                torch.distributed.ReduceOp.SUM if accelerator.device.type == "cpu" else torch.distributed.ReduceOp.MAX
            )
            torch.distributed.all_reduce(peak, together)
        self.peak_in_training = int(peak)

    def _leave_group(self) -> None:
        """What follows needs only the first process."""
        if self.accelerator.num_processes > 1:
            torch.distributed.destroy_process_group()
        gc.collect()

    def _times(self, job: Job, progress: Progress) -> dict[str, float]:
        """Seconds; the total and the first step count from the start of this process, imports and loading included."""
        steps = job.step_seconds or [0.0]
        seconds = max(progress.train_seconds, 1e-9)
        return {
            "total_seconds": time.time() - self.began,
            "train_seconds": progress.train_seconds,
            "first_step_seconds": job.first_step_at - self.began if job.first_step_at else 0.0,
            "median_step_seconds": median(steps),
            "rows_per_second": progress.rows / seconds,
            "tokens_per_second": progress.tokens / seconds,
        }

    def _identity(self, status: str) -> dict[str, Any]:
        created = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(self.run.config.stat().st_mtime))
        name, seed = self.config.name, self.config.seed
        return {"name": name, "id": self.run.name, "created": created, "status": status, "seed": seed}

    def _stopped(self, by: str) -> dict[str, Any]:
        run = {**self._identity("stopped"), "stopped_by": by}
        return self._write({"run": run, "checks": self.checks}) if self.main else {}

    def failed(self, failure: CheckFailed) -> None:
        """Leave a report that says which check stopped the run, where the disk allows it."""
        if not self.main:
            return
        row = {"name": failure.check, "passed": False, "detail": failure.what}
        try:
            self._write({"run": self._identity("failed"), "checks": [*self.checks, row]})
        except (CheckFailed, UserError) as error:
            self.display.say(f"the report could not be written either: {error}")

    def _write(self, report: dict[str, Any]) -> dict[str, Any]:
        from peftcli.reports import page

        self.run.write_report(report)
        page.write(self.run.path)
        return report
