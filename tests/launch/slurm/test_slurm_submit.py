"""Submitting, with a false sbatch: what it is given, what it may answer, and what `peft jobs` makes of the rest."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import pytest

from peftcli.artifacts.run_folder import RunFolder
from peftcli.config import frozen
from peftcli.config.compose import compose
from peftcli.launch import slurm, slurm_array, slurm_script
from tests.commands import assert_said

QUOTA = (
    "sbatch: error: AssocMaxSubmitJobLimit\\nsbatch: error: Batch job submission failed: Job violates "
    "accounting/QOS policy (job submit limit, user's size and/or time limits)"
)
LOST = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"
LATE = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"


def refuse(words: str) -> str:
    return f"printf '{words.replace(chr(39), '’')}' >&2; exit 1"


@pytest.fixture
def runs(tmp_path) -> Path:
    return tmp_path / "runs"


def test_a_run_is_submitted_with_its_frozen_config_and_nobody_waits(fake, peft, recipe, runs):
    calls = fake("sbatch", "echo '4711;jade'")
    given = ["launch=slurm", "launch.partition=gpu", "launch.nodes=2", "launch.gpus_per_node=8", "launch.time=2h"]
    began = time.monotonic()
    done = peft("train", recipe, *given, "seed=3")
    assert time.monotonic() - began < 20
    [folder] = runs.glob("2*")
    assert_said(done, 0, "submitted as job 4711", f"log: {folder / 'slurm-4711.log'}", "peft jobs cancel 4711")
    assert calls.read_text() == f"--parsable {folder / 'slurm.sh'}\n"
    script = (folder / "slurm.sh").read_text()
    assert "#SBATCH --gres=gpu:8\n" in script
    assert "#SBATCH --time=0-02:00:00\n" in script
    config = frozen.load(folder / "config.yaml")
    assert (config.launch.processes, config.launch.device, config.launch.world, config.seed) == (8, "cuda", 16, 3)
    [row] = slurm.jobs(folder)
    assert row["job"] == "4711"


@pytest.mark.parametrize("words", [QUOTA, LOST])
def test_slurm_refuses_in_its_own_words_and_leaves_no_folder(fake, peft, recipe, runs, words):
    fake("sbatch", refuse(words))
    said = words.replace("\\n", " ").replace("'", "’")
    assert_said(peft("train", recipe, "launch=slurm"), 1, "failed: slurm-refused: ", said)
    assert [*runs.glob("2*")] == []


def test_a_job_that_may_have_been_taken_keeps_its_folder(fake, peft, recipe, runs):
    fake("sbatch", refuse(LATE))
    assert_said(peft("train", recipe, "launch=slurm"), 1, "Socket timed out")
    assert len([*runs.glob("2*")]) == 1


def test_without_slurm_the_script_can_still_be_seen(peft, recipe, runs, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert_said(peft("train", recipe, "launch=slurm"), 2, "sbatch is not on this machine", "--print-script")
    assert_said(shown := peft("train", recipe, "launch=slurm", "--print-script"), 0, "#SBATCH --nodes=1")
    assert shown.output.startswith("#!/bin/bash\n")
    assert not runs.exists()
    assert_said(peft("train", recipe, "--print-script"), 2, "add launch=slurm")


def test_a_folder_that_cannot_be_written_to_stops_before_sbatch(fake, peft, recipe, mounted):
    calls = fake("sbatch", "echo 1")
    place = mounted("size=16k,ro")
    assert_said(peft("train", recipe, "launch=slurm", f"output={place}/runs"), 2, "read-only file system")
    full = mounted("size=4k")
    assert_said(peft("train", recipe, "launch=slurm", f"output={full}/runs"), 1, "disk-full")
    assert not calls.exists()


def test_what_is_for_a_new_run_is_not_ignored_when_one_is_resumed(peft, recipe, tmp_path):
    assert_said(peft("train", "--resume", tmp_path, "--print-script"), 2, "are for a new run")
    assert_said(peft("train", "--resume", tmp_path, "--array", "lines.txt"), 2, "are for a new run")


def test_two_runs_of_one_name_at_once_have_a_folder_each(recipe):
    composed = compose(str(recipe), ["launch=slurm"])
    one, two = (RunFolder.create(slurm.settled(composed.config)) for _ in range(2))
    assert one.path != two.path


def test_a_sites_own_file_is_chosen_like_a_shipped_one(peft, recipe, tmp_path, monkeypatch):
    site = tmp_path / "site"
    (site / "launch").mkdir(parents=True)
    (site / "launch" / "slurm-jade.yaml").write_text("defaults: [slurm]\npartition: small\nsetup: [module load cuda]\n")
    assert_said(peft("train", recipe, "launch=slurm-jade", "--print-script"), 2, "slurm-jade")
    monkeypatch.setenv("PEFTCLI_CONFIGS", str(site))
    given = ["launch=slurm-jade", "launch.mem=8G", "--print-script"]
    assert_said(peft("train", recipe, *given), 0, "--partition=small", "--mem=8G", "\nmodule load cuda\n")
    monkeypatch.setenv("PEFTCLI_CONFIGS", str(tmp_path / "gone"))
    assert_said(peft("train", recipe, *given), 2, "$PEFTCLI_CONFIGS: there is no folder")


def test_a_key_of_slurm_without_slurm_says_whose_it_is(peft, recipe):
    assert_said(peft("train", recipe, "launch.partition=gpu"), 2, "unknown key 'launch.partition'", "launch=slurm")
    assert_said(peft("train", recipe, "--array", "x.txt"), 2, "unknown key 'launch.array'", "launch=slurm")


def test_every_line_of_an_array_is_a_run(fake, peft, recipe, runs, tmp_path):
    calls = fake("sbatch", "echo 99")
    lines = tmp_path / "lines.txt"
    lines.write_text("# learning rates\noptim.lr=1e-3\n\noptim.lr=2e-3 seed=1  # the better one\n'name=with space'\n")
    done = peft("train", recipe, "launch=slurm", "--array", lines, "launch.at_once=2", "training.max_steps=7")
    [folder] = runs.glob("2*_array")
    assert_said(done, 0, "submitted as job 99, an array of 3")
    assert "#SBATCH --array=0-2%2\n" in (folder / "slurm.sh").read_text()
    rates = [frozen.load(folder / name / "config.yaml").optim.lr for name in ("0000", "0001", "0002")]
    assert rates == [1e-3, 2e-3, 0.02]
    assert frozen.load(folder / "0001" / "config.yaml").training.max_steps == 7
    with open(folder / "members.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["new"] * 3
    assert [row["overrides"] for row in rows] == ["optim.lr=1e-3", "optim.lr=2e-3 seed=1", "'name=with space'"]
    # One of them failed: it alone is submitted again, as the array's, or singly from its own folder.
    for name in ("0000", "0002"):
        RunFolder(folder / name).write_report({"run": {"status": "done"}})
    (folder / "0001" / "failure.json").write_text("{}")
    fake("squeue", "true")
    assert_said(peft("train", "--resume", folder), 0, "submitted as job 99, an array of 1")
    assert "#SBATCH --array=1%2\n" in (folder / "slurm.sh").read_text()
    assert_said(peft("train", "--resume", folder / "0001"), 0, "submitted as job 99")
    assert "--array" not in (folder / "0001" / "slurm.sh").read_text()
    assert calls.read_text().count("--parsable") == 3


def test_mistakes_in_the_lines_of_an_array_come_all_at_once(peft, recipe, runs, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("seed=1\noptim.lrr=1\nseed=1\nlaunch.nodes=3\nseed='1\n")
    given = ["train", recipe, "launch=slurm", "--array", lines, "--print-script"]
    assert_said(peft(*given), 2, f"{lines}:5")
    lines.write_text(lines.read_text().replace("seed='1", "seed=2"))
    said = ["unknown key 'optim.lrr'", "same overrides as in line 1", "share its launch group"]
    assert_said(peft(*given), 2, f"{lines}:2", f"{lines}:3", f"{lines}:4", *said)
    lines.write_text("# nothing\n")
    assert_said(peft(*given), 2, "has no overrides")
    assert_said(peft(*given[:3], "--array", tmp_path / "gone.txt"), 2, "gone.txt cannot be read")
    assert not runs.exists()


def test_an_array_of_hundreds_has_a_table_and_short_ranges(fake, recipe):
    fake("sbatch", "echo 5")
    config = slurm.settled(compose(str(recipe), ["launch=slurm"]).config)
    folder = slurm_array.create([(config, [f"seed={n}"]) for n in range(200)])
    assert len((folder / "members.csv").read_text().splitlines()) == 201
    assert "#SBATCH --array=0-199\n" in slurm_script.text(config.launch, folder, range(200))
    for member in range(200):
        if member != 7:
            RunFolder(folder / f"{member:04}").write_report({"run": {"status": "done"}})
    assert [m.number for m in slurm_array.refresh(folder) if m.status != "done"] == [7]


@pytest.fixture
def submitted(fake, peft, recipe, runs):
    """`submitted(7)` is the folder of a run that was submitted as job 7."""

    def submit(job: int) -> Path:
        fake("sbatch", f"echo {job}")
        before = {*runs.glob("2*")}
        assert peft("train", recipe, "launch=slurm").exit_code == 0
        return ({*runs.glob("2*")} - before).pop()

    return submit


def test_jobs_are_told_from_the_queue_the_accounts_and_the_folders(fake, peft, submitted, runs):
    waiting, running, timed_out, done, failed = (submitted(n) for n in (1, 2, 3, 4, 5))
    RunFolder(running).log({"step": 40, "loss": 0.5})
    RunFolder(running).log({"step": 40, "validation": {"accuracy": 1.0}})
    RunFolder(done).write_report({"run": {"status": "done"}})
    (failed / "failure.json").write_text("{}")
    queue = [f"1|PENDING|Resources|{waiting}/slurm.sh", f"2|RUNNING|None|{running}/slurm.sh"]
    fake("squeue", "\n".join(f"echo '{line}'" for line in [*queue, "9|RUNNING|None|/x/other.sh"]))
    calls = fake("sacct", "printf '3|TIMEOUT\\n3.batch|CANCELLED\\n4|COMPLETED\\n5|CANCELLED by 1000\\n'")
    found = peft("jobs", "--runs", runs, "--json")
    assert_said(found, 0)
    rows = {row["job"]: row for row in json.loads(found.stdout)}
    states = {job: row["state"] for job, row in rows.items()}
    assert states == {"1": "pending (Resources)", "2": "running", "3": "timeout", "4": "done", "5": "failed"}
    assert (rows["2"]["step"], rows["2"]["loss"], rows["1"]["step"]) == (40, 0.5, None)
    assert "--jobs=" in calls.read_text()
    assert_said(peft("jobs", "--runs", runs), 0, "running", "0.5", str(timed_out))
    fake("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    rows = {row["job"]: row["state"] for row in json.loads(peft("jobs", "--runs", runs, "--json").stdout)}
    assert (rows["3"], rows["4"]) == ("lost", "done")


def test_jobs_of_a_cluster_that_does_not_answer_are_told_from_their_folders(fake, peft, submitted, runs):
    folder = submitted(6)
    RunFolder(folder).write_report({"run": {"status": "stopped"}})
    fake("squeue", refuse("slurm_load_jobs error: Unable to contact slurm controller (connect failure)"))
    found = peft("jobs", "--runs", runs)
    assert_said(found, 0, "states are those of the run folders", "Unable to contact", "stopped", str(folder))


def test_jobs_are_cancelled_and_shown_by_number_or_folder(fake, peft, submitted, runs):
    folder = submitted(8)
    fake("squeue", f"echo '8|RUNNING|None|{folder}/slurm.sh'")
    calls = fake("scancel", "exit 0")
    assert_said(peft("jobs", "cancel", folder), 0, "job 8 is being cancelled")
    assert_said(peft("jobs", "cancel", "8_3"), 0)
    array = folder.with_name("many")
    fake("squeue", f"echo '9_1|RUNNING|None|{array}/slurm.sh'; echo '9_2|PENDING|None|{array}/slurm.sh'")
    assert_said(peft("jobs", "cancel", array), 0, "jobs 9_1, 9_2 are being cancelled")
    assert_said(peft("jobs", "cancel", array / "0002"), 0, "job 9_2 is being cancelled")
    assert calls.read_text().split("\n") == ["8", "8_3", "9_1 9_2", "9_2", ""]
    assert_said(peft("jobs", "cancel", folder), 2, "no job in the queue trains in")
    fake("squeue", f"echo '8|RUNNING|None|{folder}/slurm.sh'")
    assert_said(peft("jobs", "logs", 8, "--runs", runs), 2, "has printed nothing yet", "slurm-8.log")
    assert_said(peft("jobs", "logs", 12, "--runs", runs), 2, "was submitted as job 12", "allowed: 8")
    assert_said(peft("train", "--resume", folder), 2, "is job 8, which is running")
    assert_said(peft("train", "--resume", folder, "--processes=2"), 2, "--processes is for a run on one machine")
