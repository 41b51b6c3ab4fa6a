"""The samples on this machine: which are complete, are they still what was written, and their removal."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from peftcli.config import paths
from peftcli.config.errors import CheckFailed

COMPLETE = "complete"
RECORD = "sample.json"


def home() -> Path:
    """The folder that holds one folder per sample."""
    return paths.cache() / "samples"


def present(name: str) -> bool:
    """Is the sample here, whole?"""
    return (home() / name / COMPLETE).is_file()


def record(name: str) -> dict:
    """What `sample.json` says: origin, checksums, licence, conversion, date."""
    return json.loads((paths.sample_folder(name) / RECORD).read_text(encoding="utf-8"))


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest(folder: Path) -> dict[str, dict]:
    """Size in bytes and SHA-256 of every file below `folder`, by its relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (COMPLETE, RECORD))
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
    }


def verify(name: str) -> int:
    """Hashes every file again and returns how many there are.

    Raises:
        UserError: The sample is not here.
        CheckFailed: `sample-hash`: a file is changed, missing, or was never part of the sample.
    """
    folder = paths.sample_folder(name)
    try:
        expected = record(name)["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckFailed("sample-hash", f"{name}: {RECORD} is unreadable ({error})", _again(name)) from error
    found = manifest(folder)
    wrong = [f"{file} is missing" for file in expected if file not in found]
    wrong += [f"{file} is not part of the sample" for file in found if file not in expected]
    wrong += [f"{file} has changed" for file in found if file in expected and found[file] != expected[file]]
    if wrong:
        raise CheckFailed("sample-hash", f"{name}: {'; '.join(wrong)}", _again(name))
    return len(found)


def remove(name: str) -> tuple[Path, int] | None:
    """Deletes the sample, whole or half, and returns its folder and bytes; nothing where there was none."""
    folder = home() / name
    if not folder.is_dir():
        return None
    size = folder_bytes(folder)
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder)
    return folder, size


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _again(name: str) -> str:
    return f"peft samples remove {name} && peft samples fetch {name}"
