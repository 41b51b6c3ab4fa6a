"""Time limits, as people write them and as Slurm reads them."""

from __future__ import annotations

import pytest

from peftcli.config import durations


@pytest.mark.parametrize(
    ("text", "minutes", "slurm"),
    [
        ("90m", 90, "0-01:30:00"),
        ("2h", 120, "0-02:00:00"),
        ("1d12h", 36 * 60, "1-12:00:00"),
        ("90", 90, "0-01:30:00"),
        ("90:30", 91, "0-01:31:00"),
        ("2:00:00", 120, "0-02:00:00"),
        ("1-12", 36 * 60, "1-12:00:00"),
        ("1-12:30", 36 * 60 + 30, "1-12:30:00"),
        ("1-00:00:01", 24 * 60 + 1, "1-00:01:00"),
    ],
)
def test_a_time_means_the_same_in_minutes_and_to_slurm(text, minutes, slurm):
    assert durations.minutes(text) == minutes
    assert durations.slurm(text) == slurm
    assert durations.minutes(slurm) == minutes


@pytest.mark.parametrize("text", ["", "soon", "h", "0", "0h", "2 h 3", "-5", "1:2:3:4"])
def test_what_is_no_time_is_none(text):
    assert durations.minutes(text) is None
