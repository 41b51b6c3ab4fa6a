"""How a run begins or goes on: over the same rows and the same base, with its log cut to the checkpoint."""

from __future__ import annotations

from peftcli.artifacts import environment
from peftcli.artifacts.atomic import write_json
from peftcli.artifacts.run_folder import RunFolder
from peftcli.config.errors import CheckFailed
from peftcli.training import checks
from peftcli.training.checkpoints import Checkpoint
from peftcli.training.display import Display


def note(run: RunFolder, seed: int, rows: str, resumed: Checkpoint | None, display: Display) -> None:
    """Cut the log to the checkpoint and note the environment, on the same rows: its place means nothing in others.

    Args:
        run: The folder.
        seed: The run's.
        rows: Fingerprint of its rows.
        resumed: What it goes on from.
        display: Where a person reads that there is nothing to go on from.

    Raises:
        CheckFailed: `data-changed`.
    """
    if resumed:
        before = run.read_environment().get("data_fingerprint", "not noted")
        if before != rows:
            raise CheckFailed(
                "data-changed",
                f"the rows are not those that {run.path} began with: their fingerprint is {rows[:12]}, and "
                f"was {before[:12]}",
                f"put the former rows back and resume, or start another run; to train this one from its first "
                f"step on the new rows, remove {run.checkpoints} and resume",
            )
    elif run.metrics():
        display.say(f"{run.checkpoints} holds no complete checkpoint: starting at the first step")
    run.cut(resumed.progress.step if resumed else 0)
    about = {**environment.describe(), "seed": seed, "data_fingerprint": rows}
    if resumed:
        about["base_fingerprint"] = run.read_environment().get("base_fingerprint")
    write_json(run.environment, about)


def same_base(run: RunFolder, frozen_tensors: dict[str, int], resumed: Checkpoint | None) -> None:
    """A checkpoint goes on only over the frozen tensors that it began over.

    Raises:
        CheckFailed: `base-mismatch`.
    """
    now = checks.combined(frozen_tensors)
    about = run.read_environment()
    if resumed and about.get("base_fingerprint", now) != now:
        raise CheckFailed(
            "base-mismatch",
            f"the base's weights are not those that {run.path} began over, or they are loaded in another type",
            "fix model.revision in its config.yaml to the former commit, and resume on hardware of the same kind",
        )
    write_json(run.environment, {**about, "base_fingerprint": now})
