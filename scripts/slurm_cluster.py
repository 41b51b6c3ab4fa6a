"""A Slurm cluster of two nodes on this machine, to try and to test with: `up FOLDER`, `down FOLDER`.

    python scripts/slurm_cluster.py up /tmp/cluster && export SLURM_CONF=/tmp/cluster/slurm.conf
    sinfo
    python scripts/slurm_cluster.py down /tmp/cluster

Needs Debian's slurm-wlm and munge (`apt-get install slurm-wlm munge`) and no rights beyond those of the user who starts
it. Everything is in the folder: key, socket, states, logs, process ids; all ports are free ones on the loopback address
and job ids begin at a random number, so that several clusters run side by side.
"""

from __future__ import annotations

import argparse
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

NODES = ("n1", "n2")
PATIENCE = 30.0
CONFIG = """\
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldParameters=enable_configless
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
FirstJobId={first}
JobRequeue=1
KillWait=120
MessageTimeout=60
OverTimeLimit=0
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
PriorityType=priority/basic
MailProg=/bin/true
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP OverSubscribe=NO
"""


def programs() -> list[str]:
    """Those of Slurm that are missing here."""
    return [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun") if not _find(name)]


def up(folder: Path) -> Path:
    """Start a cluster in a folder; returns its slurm.conf.

    Raises:
        RuntimeError: It did not come up; with the end of its logs.
    """
    folder.mkdir(parents=True)
    folder.chmod(0o755)  # munged wants nobody else to write around its socket
    ports = _free_ports(1 + len(NODES))
    host = socket.gethostname().split(".")[0]
    rows = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 State=UNKNOWN"
        for name, port in zip(NODES, ports[1:], strict=True)
    ]
    config = folder / "slurm.conf"
    first = random.SystemRandom().randint(1000, 900_000)
    config.write_text(
        CONFIG.format(folder=folder, host=host, user=getpass.getuser(), ports=ports, first=first, nodes="\n".join(rows))
    )
    for name in ("state", *NODES):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "log", "pid", "seed")]
    _start(["munged", "--force", f"--socket={folder}/munge.socket", *files], folder)
    os.environ["SLURM_CONF"] = str(config)
    _start(["slurmctld", "-f", str(config)], folder)
    for name in NODES:
        _start(["slurmd", "-N", name, "-f", str(config)], folder)
    _wait_for_nodes(folder)
    return config


def down(folder: Path) -> None:
    """End the cluster of a folder, with what its jobs have left running, and remove the folder."""
    config = folder / "slurm.conf"
    if not config.is_file():
        return
    environ = os.environ | {"SLURM_CONF": str(config)}
    subprocess.run([_find("scancel"), "--user", getpass.getuser(), "--signal=KILL"], env=environ, capture_output=True)
    for name in (*NODES, "slurmctld", "munge"):
        _end(folder / f"{name}.pid")
    shutil.rmtree(folder, ignore_errors=True)


def _find(program: str) -> str:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin") or ""


def _start(command: list[str], folder: Path) -> None:
    done = subprocess.run([_find(command[0]), *command[1:]], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}{_logs(folder)}")


def _wait_for_nodes(folder: Path) -> None:
    end = time.monotonic() + PATIENCE
    states: list[str] = []
    while states != ["idle"] * len(NODES):
        if time.monotonic() > end:
            raise RuntimeError(f"the nodes are {states}, not idle, after {PATIENCE:g} s{_logs(folder)}")
        time.sleep(0.2)
        told = subprocess.run([_find("sinfo"), "-hN", "-o%t"], capture_output=True, text=True)
        states = told.stdout.split()


def _logs(folder: Path) -> str:
    return "".join(f"\n--- {log.name}\n{log.read_text()[-2000:]}" for log in sorted(folder.glob("*.log")))


def _end(file: Path) -> None:
    """End the process of a pid file, and wait for that."""
    if not file.is_file():
        return
    number = int(file.read_text())
    end = time.monotonic() + PATIENCE
    try:
        os.kill(number, signal.SIGTERM)
        while time.monotonic() < end and Path(f"/proc/{number}").exists():
            time.sleep(0.05)
        os.kill(number, signal.SIGKILL)
    except ProcessLookupError:
        return


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["up", "down"])
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    folder = asked.folder.absolute()
    if asked.do == "down":
        down(folder)
    elif missing := programs():
        sys.exit(f"{', '.join(missing)}: not installed here; on Debian: apt-get install slurm-wlm munge")
    else:
        print(f"export SLURM_CONF={up(folder)}")


if __name__ == "__main__":
    main()
