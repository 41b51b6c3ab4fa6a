"""From a row of the catalogue to a folder in the cache: download, check, unpack, convert, move into place.

A sample is built in a temporary folder beside its place and renamed when it is whole, under a lock: a fetch that is
interrupted leaves nothing that looks like a sample, and two fetches of one sample are one.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from importlib import metadata
from pathlib import Path

from filelock import FileLock, Timeout

from peftcli.config.errors import CheckFailed, Mistake, UserError
from peftcli.data.samples import catalog, store
from peftcli.data.samples.catalog import MB, Sample
from peftcli.data.samples.download import download
from peftcli.data.samples.unpack import unpack

Say = Callable[[str], None]


def ensure(names: Iterable[str], archives: Path | None = None, say: Say = print) -> list[Path]:
    """Fetches those samples that are not on this machine; the others cost nothing.

    Args:
        names: Names of the catalogue; all are looked up before anything is downloaded.
        archives: A folder with archives that were brought by hand; no network is used.
        say: Gets each line of progress.

    Returns:
        The folder of each sample, in the order of `names`.

    Raises:
        UserError: An unknown name, no client, no network, no room; with what to do.
        CheckFailed: `sample-hash` (the archive is not the one that was pinned), `unsafe-archive`, `sample-archive`.
    """
    samples = catalog.find(*names)
    for sample in samples:
        if not store.present(sample.name):
            fetch(sample, archives, say)
    return [store.home() / sample.name for sample in samples]


def fetch(sample: Sample, archives: Path | None = None, say: Say = print) -> Path:
    """Fetches and converts one sample, in any case of need waiting for another process that does the same."""
    if sample.needs and importlib.util.find_spec(sample.needs) is None:
        what = f"sample {sample.name!r} is converted with {sample.needs}, which is not installed"
        raise UserError(Mistake(what, hint='pip install "peftcli[samples]", then fetch again'))
    home = store.home()
    try:
        home.mkdir(parents=True, exist_ok=True)
        with _lock(home, sample, say):
            if store.present(sample.name):
                say(f"{sample.name}: fetched meanwhile by another process")
                return home / sample.name
            _announce(sample, archives, say)
            return _build(sample, home, archives, say)
    except OSError as error:
        what = f"sample {sample.name!r} was not fetched: {error.strerror or error} ({error.filename or home})"
        raise UserError(Mistake(what, hint="PEFTCLI_CACHE=FOLDER chooses another place with room")) from error


def _announce(sample: Sample, archives: Path | None, say: Say) -> None:
    size = "already on this machine" if not sample.size else f"{sample.size / MB:.1f} MB"
    source = f" from {archives}" if archives else ""
    say(f"{sample.name}: {sample.about}\n  package: {sample.origin}, {size}{source}\n  licence: {sample.licence}")


def _lock(home: Path, sample: Sample, say: Say) -> FileLock:
    lock = FileLock(home / f".{sample.name}.lock")
    try:
        lock.acquire(timeout=0)
        lock.release()
    except Timeout:
        say(f"{sample.name}: another process is fetching it; waiting")
    return lock


def _build(sample: Sample, home: Path, archives: Path | None, say: Say) -> Path:
    started = time.monotonic()
    for stale in home.glob(f".{sample.name}.tmp-*"):  # of a fetch that was killed: we hold the lock, so nobody's
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{sample.name}.tmp-", dir=home) as scratch:
        work = Path(scratch)
        source, out = work / "unpacked", work / "sample"
        source.mkdir()
        out.mkdir()
        origin = _collect(sample, work, source, archives, say)
        say("  converting")
        module, function = sample.convert.split(":")
        with _quiet_loading() if sample.kind == "weights" else nullcontext():
            notes = getattr(importlib.import_module(module), function)(source, out)
        _record(sample, out, origin, notes)
        final = home / sample.name
        if final.exists():  # without its marker, or we would not be here
            shutil.rmtree(final)
        out.rename(final)
    seconds, size = time.monotonic() - started, store.folder_bytes(final)
    say(f"  done: {final} ({size / MB:.0f} MB, {seconds:.0f} s)")
    return final


def _collect(sample: Sample, work: Path, source: Path, archives: Path | None, say: Say) -> dict:
    """Puts the members into `source` and returns where they came from."""
    origin = {"registry": sample.registry, "package": sample.package, "version": sample.version}
    if sample.registry == "installed":
        here = platform.python_version() if sample.package == "python" else metadata.version(sample.package)
        return {**origin, "version": here}
    if sample.installed and not archives and _installed(sample, source):
        say(f"  the same files are installed in {sample.installed}: nothing to download")
        return {**origin, "installed": sample.installed}
    archive = _brought(sample, archives) if archives else download(sample, work, say)
    found = store.sha256(archive)
    if found != sample.sha256:
        raise CheckFailed(
            "sample-hash",
            f"{archive.name} has SHA-256 {found}, but {sample.package} {sample.version} should have {sample.sha256}",
            "nothing was unpacked; the file was damaged on its way or is not the one this version of peftcli knows",
        )
    unpack(archive, source, sample.members)
    return {**origin, "archive": archive.name, "archive_bytes": archive.stat().st_size, "archive_sha256": found}


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without Transformers' progress bars: conversions load the model they wrote once, to check it."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _installed(sample: Sample, source: Path) -> bool:
    """Copies the members from where a package put them, if each has the checksum of the pinned version."""
    for name, sha in sample.member_sha256.items():
        path = Path(sample.installed) / name
        if not path.is_file() or store.sha256(path) != sha:
            return False
        shutil.copyfile(path, source / name)
    return bool(sample.member_sha256)


def _brought(sample: Sample, archives: Path) -> Path:
    for path in sorted(archives.iterdir()) if archives.is_dir() else ():
        if path.is_file() and path.stat().st_size == sample.size and store.sha256(path) == sample.sha256:
            return path
    what = f"no file in {archives} is the archive of {sample.origin}"
    raise UserError(Mistake(what, hint=f"it has {sample.size} bytes and SHA-256 {sample.sha256}"))


def _record(sample: Sample, out: Path, origin: dict, notes: dict) -> None:
    about = {
        "name": sample.name,
        "kind": sample.kind,
        "about": sample.about,
        "licence": sample.licence,
        "origin": origin,
        "conversion": sample.convert,
        **notes,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "files": store.manifest(out),
    }
    for path in out.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # a cache may be shared; safetensors writes files for their owner
    (out / store.RECORD).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / store.COMPLETE).touch()
