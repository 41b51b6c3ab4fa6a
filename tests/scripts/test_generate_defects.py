"""Drawn pictures: the same from the same command, none like another, and a defect changes a small part of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import generate_defects
import numpy as np
import pytest

from peftcli.data.images import copies
from peftcli.data.images.likeness import fingerprint


def run(folder: Path, *more: str) -> dict[str, bytes]:
    command = [
        sys.executable,
        str(generate_defects.__file__),
        str(folder / "pictures"),
        "--good",
        "4",
        "--bad",
        "3",
        "--new",
        "5",
        *more,
    ]
    subprocess.run(command, check=True, capture_output=True)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.jpg"))}


def test_the_same_command_draws_the_same_pictures(tmp_path) -> None:
    first, again, other = (run(tmp_path / name, *more) for name, more in (("a", ()), ("b", ()), ("c", ("--seed", "1"))))
    assert first == again
    assert set(first.values()).isdisjoint(other.values())
    assert len(set(first.values())) == 12
    assert sorted(first)[:5] == [f"new/{n:04}.jpg" for n in range(5)]


def test_no_picture_is_a_copy_of_another() -> None:
    drawn = [np.array(generate_defects.draw(number, bad)) for bad in (False, True) for number in range(40)]
    assert copies._together([fingerprint(pixels) for pixels in drawn]) == ([], False)


@pytest.mark.parametrize("kind", ["scratch", "stain", "dent"])
@pytest.mark.parametrize("surface", ["metal", "fabric", "tiles"])
def test_a_defect_is_seen_and_is_small(kind, surface) -> None:
    for number in range(8):
        sound = generate_defects.SURFACE[surface](np.random.default_rng(number), generate_defects.SIDE)
        for strength in (generate_defects.FAINT, generate_defects.CLEAR):
            spoilt = generate_defects.DEFECT[kind](sound, np.random.default_rng([number, 1]), strength)
            change = np.abs(spoilt - sound).max(axis=2)
            assert change.max() > 10  # of 255, beside noise of 2
            assert (change > 5).mean() < 0.25
