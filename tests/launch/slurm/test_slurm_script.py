"""The batch script: every directive against Slurm's manual, and what its shell does, with other programs in the place
of Slurm's."""

from __future__ import annotations

import gzip
import re
import socket
import subprocess
from pathlib import Path

import pytest

from peftcli.config.schema import SlurmConfig
from peftcli.launch import slurm_array, slurm_script

MANUAL = Path("/usr/share/man/man1/sbatch.1.gz")
FULL = SlurmConfig(
    partition="gpu", account="physics", qos="long", constraint="a100|h100", nodes=2, processes=8, gpus_per_node=8,
    gpu_type="a100", cpus_per_task=64, mem="500G", time="1d12h", at_once=4, setup=["module load cuda"],
    container="apptainer exec --nv image.sif", options=["--exclusive"],
)  # fmt: skip
DIRECTIVES = {
    "job-name": (r".+", "Specify a name for the job allocation."),
    "partition": (r"gpu", "Request a specific partition for the resource allocation."),
    "account": (r"physics", "Charge resources used by this job to specified account."),
    "qos": (r"long", "Request a quality of service for the job."),
    "constraint": (r'"?a100\|h100"?', "Nodes can have features assigned to them by the Slurm administrator."),
    "nodes": (r"2", "If only one number is specified, this is used as both the minimum and maximum node count."),
    "ntasks-per-node": (r"1", "Request that ntasks be invoked on each node."),
    "cpus-per-task": (
        r"64",
        "Advise the Slurm controller that ensuing job steps will require ncpus number of processors per task.",
    ),
    "gres": (r"gpu:a100:8", 'The format of each entry on the list is "name[[:type]:count]".'),
    "mem": (r"\d+[KMGT]", "Specify the real memory required per node."),
    "time": (r"1-12:00:00", '"days-hours:minutes:seconds"'),
    "array": (r"0-199%4", "A maximum number of simultaneously running tasks from the job array may be specified"),
    "signal": (r"TERM@120", "By default all job steps will be signaled, but not the batch shell itself."),
    "requeue": ("", "Specifies that the batch job should be eligible for requeuing."),
    "open-mode": (r"append", "Open the output and error files using append or truncate mode as specified."),
    "output": (r".*%4a/slurm-%A_%a\.log", '"%A" is replaced by the job ID and "%a" with the array index.'),
}
"""Each directive with the form of its value here, and the manual's sentence that makes it mean what is meant."""


def written(text: str) -> dict[str, str]:
    rows = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (row.partition("=") for row in rows)}


def test_every_directive_has_the_form_of_its_row_above():
    found = written(slurm_script.text(FULL, Path("/runs/one"), range(200)))
    assert found.pop("exclusive") == ""
    assert found.keys() == DIRECTIVES.keys()
    assert [name for name, value in found.items() if not re.fullmatch(DIRECTIVES[name][0], value)] == []


@pytest.mark.skipif(not MANUAL.is_file(), reason=f"{MANUAL} is not installed (apt-get install slurm-client)")
@pytest.mark.parametrize("name", DIRECTIVES)
def test_the_manual_says_of_a_directive_what_is_meant(name):
    plain = re.sub(r"\\f[BIR]|\\(?=-)|^\.[A-Z]{2,}.*$", "", gzip.decompress(MANUAL.read_bytes()).decode(), flags=re.M)
    sections = re.split(r"\n(?=(?:-\w, )?--[a-z])", plain)
    of_name = [part for part in sections if re.match(rf"(-\w, )?--{name}(?![\w-])", part)]
    assert any(DIRECTIVES[name][1] in " ".join(part.split()).replace("\\(dq", '"') for part in of_name), of_name


def test_what_is_not_asked_for_is_left_to_the_cluster():
    found = written(slurm_script.text(SlurmConfig(), Path("/runs/one")))
    assert set(found) == {"job-name", "nodes", "ntasks-per-node", "signal", "requeue", "open-mode", "output"}


def test_names_with_spaces_and_percents_reach_sbatch_whole():
    text = slurm_script.text(SlurmConfig(), Path("/my runs/100% of it"))
    assert '#SBATCH --output="/my runs/100%% of it/slurm-%j.log"' in text
    assert "\nrun='/my runs/100% of it'\n" in text


def test_a_container_runs_its_own_python_and_setup_lines_come_before():
    text = slurm_script.text(FULL, Path("/runs/one"))
    assert text.index("\nmodule load cuda\n") < text.index("\nsrun ")
    assert "--cpus-per-task=64 --label apptainer exec --nv image.sif python -P -m peftcli.launch.node" in text


@pytest.mark.parametrize("numbers", [[0], [0, 1, 2], [0, 2, 3, 4, 9], [7, 1]])
def test_ranges_are_read_as_they_were_written(numbers):
    assert slurm_array.numbers(slurm_script.ranges(numbers)) == sorted(numbers)


@pytest.fixture
def run_script(fake, tmp_path):
    """Run a script where srun ends with a code and squeue says a state; returns the exit code and what was asked."""

    def run(code: int, state: str, job: int = 1000, again: bool = False) -> tuple[int, str, str]:
        srun = fake("srun", f"echo port $PEFTCLI_PORT; exit {code}")
        fake("squeue", f"echo {state}")
        scontrol = fake("scontrol", "exit 0")
        script = tmp_path / "slurm.sh"
        script.write_text(slurm_script.text(SlurmConfig(python="python3"), tmp_path))
        if again:
            (tmp_path / slurm_script.AGAIN).touch()
        done = subprocess.run(
            ["bash", str(script)], env={"PATH": f"{srun.parent}:/usr/bin:/bin", "SLURM_JOB_ID": str(job)},
            capture_output=True, text=True,
        )  # fmt: skip
        assert srun.read_text().rstrip().endswith("python3 -P -m peftcli.launch.node " + str(tmp_path))
        return done.returncode, scontrol.read_text().strip() if scontrol.is_file() else "", done.stdout.strip()

    return run


@pytest.mark.parametrize(
    ("code", "again", "state", "requeued"),
    [
        pytest.param(0, True, "RUNNING", "requeue 1000", id="stopped before its time limit"),
        pytest.param(0, True, "COMPLETING", "", id="stopped because it was cancelled"),
        pytest.param(0, True, "", "", id="stopped, and squeue says nothing"),
        pytest.param(0, False, "RUNNING", "", id="done"),
        pytest.param(1, False, "RUNNING", "", id="failed"),
        pytest.param(1, True, "RUNNING", "", id="stopped because another node failed"),
        pytest.param(2, False, "RUNNING", "", id="a mistake of the user"),
        pytest.param(137, True, "RUNNING", "", id="killed"),
    ],
)
def test_only_a_run_that_was_told_to_stop_in_time_goes_back_into_the_queue(run_script, code, again, state, requeued):
    assert run_script(code, state, again=again)[:2] == (code, requeued)


def test_a_member_of_an_array_is_asked_for_by_its_own_number():
    text = slurm_script.text(SlurmConfig(), Path("/runs/many"), range(3))
    assert 'job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"\n' in text  # one of them has the array's as SLURM_JOB_ID
    assert 'job="$SLURM_JOB_ID"\n' in slurm_script.text(SlurmConfig(), Path("/runs/one"))


def test_launchers_meet_at_the_next_port_where_nobody_listens(run_script):
    with socket.create_server(("127.0.0.1", 0)) as anywhere:
        start = 20_000 + anywhere.getsockname()[1] % 10_000  # not the same in two test runs on one machine
    for port in range(start, 32_000):
        try:
            taken = socket.create_server(("127.0.0.1", port))
        except OSError:
            continue
        with taken:
            said = run_script(0, "", job=port - 20_000)[2]
        assert int(said.removeprefix("port ")) > port
        return
