"""Every row once an epoch, whatever the processes, from whatever position; and what length grouping saves."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftcli.data.sampler import BatchSampler

LENGTHS = st.lists(st.integers(1, 400), min_size=1, max_size=120)
SAMPLERS = st.builds(
    BatchSampler,
    LENGTHS,
    batch_size=st.integers(1, 17),
    batch_tokens=st.none() | st.integers(1, 2000),
    group_by_length=st.booleans(),
    seed=st.integers(0, 5),
)


def epoch_of(sampler: BatchSampler, epoch: int) -> list[list[int]]:
    return [sampler.batch(epoch, position) for position in range(sampler.steps_per_epoch)]


@settings(max_examples=150, deadline=None)
@given(SAMPLERS, st.integers(0, 3))
def test_every_row_exactly_once_in_each_epoch(sampler, epoch):
    rows = [row for batch in epoch_of(sampler, epoch) for row in batch]
    assert sorted(rows) == list(range(len(sampler.lengths)))
    with pytest.raises(IndexError):
        sampler.batch(epoch, sampler.steps_per_epoch)


@settings(max_examples=150, deadline=None)
@given(SAMPLERS, st.integers(0, 2))
def test_batches_hold_what_they_may(sampler, epoch):
    for batch in epoch_of(sampler, epoch):
        assert batch
        if sampler.batch_tokens is None:
            assert len(batch) <= sampler.batch_size
        else:
            assert len(batch) == 1 or len(batch) * sampler.lengths[batch].max() <= sampler.batch_tokens


@settings(max_examples=150, deadline=None)
@given(SAMPLERS, st.integers(1, 6))
def test_shares_make_up_the_batch_for_any_number_of_processes(sampler, world):
    for batch in epoch_of(sampler, 0):
        shares = [sampler.share(batch, rank, world) for rank in range(world)]
        assert Counter(row for share in shares for row in share) == Counter(batch)
        if len(batch) >= world:
            assert all(shares)
        for share in shares:
            assert share == [row for row in batch if row in set(share)]


@settings(max_examples=80, deadline=None)
@given(SAMPLERS, st.data())
def test_a_new_sampler_goes_on_at_any_step_as_the_old_one_would(sampler, data):
    step = data.draw(st.integers(0, 3 * sampler.steps_per_epoch))
    again = BatchSampler(
        sampler.lengths.tolist(), sampler.batch_size, sampler.batch_tokens, sampler.group_by_length, sampler.seed
    )
    for earlier in range(step):
        sampler.at(earlier)
    assert again.at(step) == sampler.at(step)


def test_order_differs_between_epochs_and_seeds_and_is_the_same_in_another_process():
    first, other = BatchSampler(100, 8, seed=1), BatchSampler(100, 8, seed=2)
    assert first.batch(0, 0) != first.batch(1, 0)
    assert first.batch(0, 0) != other.batch(0, 0)
    code = "from peftcli.data.sampler import BatchSampler; print(BatchSampler(100, 8, seed=1).batch(5, 3))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(first.batch(5, 3))


def test_token_batches_differ_between_epochs():
    lengths = np.random.default_rng(0).integers(5, 300, 500).tolist()
    sampler = BatchSampler(lengths, 1, batch_tokens=2000)
    together = [{frozenset(batch) for batch in epoch_of(sampler, epoch)} for epoch in (0, 1)]
    assert len(together[0] & together[1]) < 0.05 * len(together[0])


def padded(sampler: BatchSampler) -> int:
    return sum(len(batch) * sampler.lengths[batch].max() for batch in epoch_of(sampler, 0))


@pytest.mark.parametrize("batch_tokens", [None, 4000])
def test_grouping_saves_most_of_the_padding(batch_tokens):
    lengths = np.random.default_rng(1).lognormal(4, 0.8, 4000).clip(4, 512).astype(int).tolist()
    plain = padded(BatchSampler(lengths, 16, batch_tokens)) / sum(lengths)
    grouped = padded(BatchSampler(lengths, 16, batch_tokens, group_by_length=True)) / sum(lengths)
    assert plain > 1.8
    assert grouped < 1.1


def test_shares_cost_about_the_same():
    lengths = np.random.default_rng(2).integers(10, 500, 64).tolist()
    sampler = BatchSampler(lengths, 32)
    for batch in epoch_of(sampler, 0):
        tokens = [sum(lengths[row] for row in sampler.share(batch, rank, 4)) for rank in range(4)]
        assert max(tokens) < 1.1 * min(tokens)


def test_parts_of_an_epoch_are_rounded_up():
    sampler = BatchSampler(100, 8)
    assert sampler.steps_per_epoch == 13
    assert [sampler.total_steps(epochs) for epochs in (0.01, 0.5, 1, 1.1, 3)] == [1, 7, 13, 15, 39]


def test_lengths_are_needed_where_they_matter():
    with pytest.raises(ValueError, match="length of every row"):
        BatchSampler(10, 2, batch_tokens=100)
    with pytest.raises(ValueError, match="no rows"):
        BatchSampler([], 2)
