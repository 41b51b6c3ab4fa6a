"""Takes chosen files out of an archive somebody else made: nothing is written outside the folder, or without bound."""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from peftcli.config.errors import CheckFailed

LIMIT = 1_000_000_000  # bytes; the largest sample unpacks to 98 MB
CHUNK = 1 << 20

Member = tuple[str, bool, BinaryIO | None]  # name, is it a regular file, its bytes


def unpack(archive: Path, folder: Path, members: tuple[str, ...], limit: int = LIMIT) -> list[Path]:
    """Writes the members that match a pattern below `folder`, under their own names.

    Args:
        archive: A zip (or wheel), a tar under any compression, or a Debian package (ar around a tar).
        members: Patterns in the sense of `fnmatch`; each must match some file.
        limit: The most bytes that all written files may hold together, counted as they are read.

    Raises:
        CheckFailed: `unsafe-archive`: any member has an absolute name or one with `..`, a chosen one is a link or a
            device, or the files are larger than `limit`. `sample-archive`: unreadable, or a pattern matched nothing.
    """
    written: list[Path] = []
    matched: set[str] = set()
    left = limit
    try:
        with archive.open("rb") as file:
            for name, regular, stream in _members(file, archive.name):
                path = _safe(name, archive.name)
                hits = {pattern for pattern in members if fnmatchcase(str(path), pattern)}
                if not hits or name.endswith("/"):
                    continue
                if not regular or stream is None:
                    raise CheckFailed("unsafe-archive", f"{archive.name}: {name!r} is a link or a device, not a file")
                target = folder / path
                if target in written:
                    raise CheckFailed("unsafe-archive", f"{archive.name} holds {name!r} twice")
                target.parent.mkdir(parents=True, exist_ok=True)
                left -= _copy(stream, target, left, archive.name)
                written.append(target)
                matched |= hits
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise CheckFailed("sample-archive", f"{archive.name} cannot be unpacked: {error}") from error
    if missing := [pattern for pattern in members if pattern not in matched]:
        raise CheckFailed("sample-archive", f"{archive.name} has no file like {', '.join(missing)}")
    return written


def _members(file: BinaryIO, name: str) -> Iterator[Member]:
    magic = file.read(8)
    file.seek(0)
    if magic.startswith(b"PK"):
        yield from _zip_members(file)
    elif magic == b"!<arch>\n":
        yield from _tar_members(_debian_data(file, name))
    else:
        yield from _tar_members(file)


def _zip_members(file: BinaryIO) -> Iterator[Member]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            regular = not info.is_dir() and kind in (0, stat.S_IFREG)
            with archive.open(info) as stream:
                yield info.orig_filename, regular, stream  # type: ignore[misc]


def _tar_members(file: BinaryIO) -> Iterator[Member]:
    with tarfile.open(fileobj=file, mode="r:*") as archive:
        for info in archive:
            name = info.name + "/" if info.isdir() else info.name
            yield name, info.isfile(), archive.extractfile(info) if info.isfile() else None  # type: ignore[misc]


def _debian_data(file: BinaryIO, name: str) -> BinaryIO:
    """The `data.tar.*` inside a Debian package: `ar` is a line of 60 bytes before each file."""
    file.seek(8)
    while len(header := file.read(60)) == 60:
        size = int(header[48:58])
        if header.startswith(b"data.tar"):
            return io.BytesIO(file.read(size))
        file.seek(size + size % 2, io.SEEK_CUR)
    raise CheckFailed("sample-archive", f"{name} is a Debian package without data")


def _safe(name: str, archive: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or ":" in name.split("/")[0]:
        raise CheckFailed("unsafe-archive", f"{archive}: {name!r} would be written outside its folder")
    return path


def _copy(stream: BinaryIO, target: Path, left: int, archive: str) -> int:
    size = 0
    with target.open("xb") as out:
        while chunk := stream.read(CHUNK):
            size += len(chunk)
            if size > left:
                raise CheckFailed("unsafe-archive", f"{archive} unpacks to more than its bound")
            out.write(chunk)
    return size
