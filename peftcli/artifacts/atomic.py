"""Writing so that a reader finds the old file or the new one, never half of one.

Everything is written to a temporary name beside its place, flushed to the disk and renamed. A process killed in between
leaves only a `.NAME.partial`, which the next write of the same name clears away.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from peftcli.config.errors import CheckFailed, Mistake, UserError

UMASK = os.umask(0)
os.umask(UMASK)
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DAMAGED = {errno.EIO, errno.ENOMEM}


@contextmanager
def file(path: Path, expected_bytes: int | None = None) -> Iterator[Path]:
    """Hand out a temporary name; when the block ends well, what was written there becomes `path`.

    Args:
        path: Where the file shall be.
        expected_bytes: Its size where that is known, for the message on a full disk.

    Raises:
        UserError: The place cannot be written to.
        CheckFailed: `disk-full` or `write-failed`; an earlier `path` is unchanged.
    """
    partial = path.with_name(f".{path.name}.partial")
    with _explained(path, partial, expected_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)


@contextmanager
def folder(path: Path) -> Iterator[Path]:
    """Hand out a temporary folder; when the block ends well it becomes `path`, in place of what was there.

    Raises:
        UserError: The place cannot be written to.
        CheckFailed: `disk-full` or `write-failed`; an earlier `path` is unchanged.
    """
    partial, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    with _explained(path, partial, None):
        _put_back(path, old)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for part in [*partial.rglob("*"), partial]:
            _flush(part)
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(partial, path)
        except BaseException:
            _put_back(path, old)
            raise
        _flush(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole. Raises as `file` does."""
    with file(path, len(data)) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole. Raises as `file` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON. Raises as `file` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write named tensors as safetensors; tensors must not share memory. Raises as `file` does."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with file(path, sum(tensor.nbytes for tensor in contiguous.values())) as partial:
        save_file(contiguous, partial, metadata={"format": "pt"} | (metadata or {}))


def explain(error: OSError | SafetensorError, path: Path, written: str = "") -> UserError | CheckFailed | None:
    """What a failed write means to the user: their place (UserError), a full or failing disk (CheckFailed), or neither.

    Args:
        error: From the operating system, or from safetensors, which puts the number into its text.
        path: What should have been written.
        written: How much of it was to be, or was, written.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found[1])
    if number is None:
        return None
    home, path = _existing(path.parent), _final(path)
    reason = os.strerror(number).lower()
    if number in FULL:
        free = f"{shutil.disk_usage(home).free:,} bytes are free in {home}"
        return CheckFailed(
            "disk-full",
            f"could not write {path}{written}: {reason}; {free}",
            "nothing that was complete before is lost; make room and run it again (a run: peft train --resume RUN)",
        )
    if number in DAMAGED:
        hint = "nothing that was complete before is lost; look at the disk, then run it again"
        return CheckFailed("write-failed", f"could not write {path}{written}: {reason}", hint)
    hint = "choose a folder that you may write to: output=FOLDER for a run, --to FOLDER for an export"
    return UserError(Mistake(f"cannot write {path}: {reason}", hint=hint))


@contextmanager
def _explained(path: Path, partial: Path, expected_bytes: int | None) -> Iterator[None]:
    """Clear the unfinished write away and say in the user's words what went wrong."""
    try:
        yield
    except BaseException as error:
        size = expected_bytes if expected_bytes is not None else _size(partial)
        _remove(partial)
        if isinstance(error, OSError | SafetensorError):
            amount = f" ({size:,} bytes)" if expected_bytes is not None else f" ({size:,} bytes were written)"
            if told := explain(error, path, amount):
                raise told from error
        raise


def _flush(path: Path) -> None:
    """Bring a file or folder to the disk; safetensors makes its files private, others of the group shall read them."""
    if path.is_file():
        path.chmod(0o666 & ~UMASK)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_back(path: Path, old: Path) -> None:
    """Undo a replacement that a kill stopped between its two renames."""
    if not old.exists():
        return
    if path.exists():
        shutil.rmtree(old)
    else:
        os.replace(old, path)


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        try:
            partial.unlink()
        except OSError:
            return


def _size(path: Path) -> int:
    parts = path.rglob("*") if path.is_dir() else [path]
    return sum(part.stat().st_size for part in parts if part.is_file())


def _existing(path: Path) -> Path:
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def _final(path: Path) -> Path:
    """The place that a name inside an unfinished folder stands for."""
    return Path(*(re.sub(r"^\.(.+)\.partial$", r"\1", part) for part in path.parts))
