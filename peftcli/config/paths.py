"""Where things live: the shipped recipes and groups, what is bundled, the cache, the samples."""

from __future__ import annotations

import os
from pathlib import Path

from peftcli.config.errors import Mistake, UserError, unknown
from peftcli.config.sample_kinds import BUNDLED


def shipped(folder: str) -> Path:
    """The shipped `configs` or `recipes` folder: inside an installed package, else beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / folder
    return inside if inside.is_dir() else package.parent / folder


def site() -> Path | None:
    """The folder of groups of this site, `$PEFTCLI_CONFIGS`, laid out like the shipped `configs`.

    Raises:
        UserError: The variable names no folder.
    """
    named = os.environ.get("PEFTCLI_CONFIGS")
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise UserError(Mistake(f"there is no folder {folder}", "$PEFTCLI_CONFIGS"))
    return folder


def bundled(name: str) -> Path:
    """The folder of a model or a data set inside this package.

    Raises:
        UserError: Nothing of that name is bundled, or the installation lost it.
    """
    if name not in BUNDLED:
        raise UserError(unknown("bundled model or data set", name, BUNDLED))
    folder = Path(__file__).resolve().parent.parent / "bundled" / name
    if not folder.is_dir():
        raise UserError(Mistake(f"{name} is missing from this installation", str(folder), hint="install peftcli again"))
    return folder


def cache() -> Path:
    """The cache folder: `$PEFTCLI_CACHE`, else `$XDG_CACHE_HOME/peftcli`, else `~/.cache/peftcli`."""
    if named := os.environ.get("PEFTCLI_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftcli"


def sample_folder(name: str) -> Path:
    """The folder of a fetched and converted sample.

    Raises:
        UserError: It is not there; the message names the command that fetches it.
    """
    if not has_sample(name):
        raise UserError(
            Mistake(f"sample {name!r} is not on this machine", hint=f"fetch it once with: peft samples fetch {name}")
        )
    return cache() / "samples" / name


def has_sample(name: str) -> bool:
    """Whether a sample is on this machine, whole."""
    return (cache() / "samples" / name / "complete").is_file()
