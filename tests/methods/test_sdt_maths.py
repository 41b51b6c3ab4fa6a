"""SDT's mathematics: published counts to the last integer, planted selections, scattered deltas, the reference's bugs.

Shapes: as in peftcli/methods/sdt/maths.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from peftcli.config.errors import CheckFailed, UserError
from peftcli.methods.sdt import maths

VOCABULARY, N = 50_280, 16


@dataclass(frozen=True)
class Size:
    """A published Mamba: width d, layers, channels D, rank R of dt."""

    d: int
    layers: int

    @property
    def D(self) -> int:
        return 2 * self.d

    @property
    def R(self) -> int:
        return self.d // 16

    @property
    def base(self) -> int:
        d, D, R = self.d, self.D, self.R
        layer = 2 * D * d + 5 * D + D * (R + 2 * N) + (R * D + D) + D * N + D + D * d + d
        return self.layers * layer + VOCABULARY * d + d

    def sdt(self, freeze_states: float = 0.75, targets: tuple[str, ...] = ("ssm.out",)) -> maths.Parameters:
        K, S = maths.count(0.01, self.D), maths.count(float(1 - Decimal(str(freeze_states))), N)
        return maths.parameters(self.D, N, self.R, self.d, self.layers, K, S, 8, targets)


SIZES = {"130m": Size(768, 24), "370m": Size(1024, 48), "790m": Size(1536, 48), "1.4b": Size(2048, 48)}
SIZES["2.8b"] = Size(2560, 64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Counts.


@pytest.mark.parametrize(
    ("size", "base"),
    [
        ("130m", 129_135_360),
        ("370m", 371_516_416),
        ("790m", 793_204_224),
        ("1.4b", 1_372_178_432),
        ("2.8b", 2_768_345_600),
    ],
)
def test_the_base_has_as_many_parameters_as_published(size: str, base: int) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    one = SIZES[size]
    assert one.base == base
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=one.d, num_hidden_layers=one.layers, state_size=N)
    with torch.device("meta"):
        model = MambaForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == base


@pytest.mark.parametrize(
    ("size", "freeze", "per_layer", "lora", "trained", "percent"),
    [
        ("130m", 0.75, (60, 240, 240), 18_432, 455_328, 0.3514),
        ("130m", 0.90, (30, 240, 240), 18_432, 454_608, 0.3508),
        ("130m", 0.95, (15, 240, 240), 18_432, 454_248, 0.3505),
        ("370m", 0.75, (80, 320, 320), 24_576, 1_214_208, 0.3258),
        ("790m", 0.75, (124, 496, 496), 36_864, 1_823_040, 0.2293),
        ("1.4b", 0.75, (164, 656, 656), 49_152, 2_430_144, 0.1768),
        ("1.4b", 0.90, (82, 656, 656), 49_152, 2_426_208, 0.1765),
        ("1.4b", 0.95, (41, 656, 656), 49_152, 2_424_240, 0.1764),
        ("2.8b", 0.75, (204, 816, 816), 61_440, 4_049_664, 0.1461),
    ],
)
def test_what_sdt_trains(size, freeze, per_layer, lora, trained, percent) -> None:
    one = SIZES[size]
    found = one.sdt(freeze)
    expected = (*(one.layers * part for part in per_layer), one.layers * lora)
    assert (found.A, found.B, found.C, found.lora, found.trained) == (*expected, trained)
    assert round(100 * trained / (one.base + trained), 4) == percent


@pytest.mark.parametrize(("size", "alone", "percent"), [("130m", 12_960, 0.0100), ("1.4b", 70_848, 0.0052)])
def test_sdt_without_lora(size, alone, percent) -> None:
    found = SIZES[size].sdt(targets=())
    assert found.trained == alone
    assert round(100 * alone / (SIZES[size].base + alone), 4) == percent


def test_the_warm_up_and_what_the_reference_prints() -> None:
    expected = {"130m": 589_824, "370m": 1_572_864, "790m": 2_359_296, "1.4b": 3_145_728, "2.8b": 5_242_880}
    assert {name: size.sdt().G for name, size in SIZES.items()} == expected
    small = SIZES["130m"]
    assert small.sdt().reference == 1_045_152
    assert round(100 * small.sdt().reference / (small.base + small.sdt().reference), 4) == 0.8028


@pytest.mark.parametrize(
    ("rank", "projections", "small", "small_percent", "large", "large_percent"),
    [
        (2, "out x.dt x.B x.C dt", 411_648, 0.3178, 2_190_336, 0.1594),
        (3, "out x.dt x.B x.C", 503_424, 0.3883, 2_677_248, 0.1947),
        (5, "out dt", 466_560, 0.3600, 2_488_320, 0.1810),
        (8, "in.x in.z out", 1_327_104, 1.0172, 7_077_888, 0.5132),
        (8, "x.dt x.B x.C dt", 1_204_224, 0.9239, 6_402_048, 0.4644),
    ],
)
def test_lora_of_the_reference_which_splits_two_projections(
    rank, projections, small, small_percent, large, large_percent
) -> None:
    for size, expected, percent in (("130m", small, small_percent), ("1.4b", large, large_percent)):
        one = SIZES[size]
        D, R, d = one.D, one.R, one.d
        split = {"out": D + d, "x.dt": D + R, "x.B": D + N, "x.C": D + N, "dt": R + D, "in.x": d + D, "in.z": d + D}
        trained = one.layers * rank * sum(split[name] for name in projections.split())
        assert trained == expected
        assert round(100 * trained / (one.base + trained), 4) == percent


@pytest.mark.parametrize("targets", [(), ("ssm.out",), ("ssm.in", "ssm.out"), ("ssm.in", "ssm.x", "ssm.dt", "ssm.out")])
def test_lora_counts_are_those_of_the_real_projections(targets) -> None:
    from transformers import MambaConfig, MambaModel

    model = MambaModel(MambaConfig(vocab_size=8, hidden_size=32, num_hidden_layers=2, state_size=4))
    mixer = model.layers[0].mixer
    shapes = [getattr(mixer, f"{target.removeprefix('ssm.')}_proj").weight.shape for target in targets]
    found = maths.parameters(64, 4, mixer.time_step_rank, 32, 2, K=3, S=2, rank=5, lora_targets=targets)
    assert found == maths.Parameters(A=12, B=24, C=24, lora=2 * 5 * sum(map(sum, shapes)), G=512)


@pytest.mark.parametrize(
    ("share", "total", "expected"),
    [
        *[(0.01, total, n) for total, n in ((1536, 15), (2048, 20), (3072, 31), (4096, 41), (5120, 51))],
        *[(share, 16, n) for share, n in ((0.25, 4), (0.1, 2), (0.05, 1), (1.0, 16), (0.01, 1), (1e-20, 1))],
        (0.5, 5, 3),  # round(2.5) = 2 frozen
        (0.5, 7, 3),  # round(3.5) = 4 frozen
        (0.0, 16, 0),
        (0, 16, 0),
        (1, 16, 1),
        (16, 16, 16),
    ],
)
def test_counts(share, total, expected) -> None:
    assert maths.count(share, total) == expected


@given(st.integers(0, 9999), st.integers(1, 10_000))
def test_a_share_counts_like_the_published_freeze_ratio(ten_thousandths: int, total: int) -> None:
    freeze = Decimal(ten_thousandths) / 10_000
    published = total - round(float(freeze) * total)
    assert maths.count(float(1 - freeze), total) == max(1, published)


def test_more_than_there_are() -> None:
    with pytest.raises(UserError, match=r"method\.channels is 17, but there are only 16"):
        maths.count(17, 16)
    with pytest.raises(UserError, match=r"method\.states is 5"):
        maths.select(random(8, 4).abs(), 2, 5)


# Selection.


def test_a_planted_warm_up_is_found_exactly() -> None:
    G_DN = 1e-3 * random(24, 8)
    for channel, state, value in ((17, 5, -0.9), (17, 2, 0.8), (3, 7, 0.5), (3, 0, -0.4), (9, 1, 0.3), (9, 6, 0.2)):
        G_DN[channel, state] = value
    found = maths.select(maths.magnitude(G_DN), 3, 2)
    assert found.channels_K.tolist() == [3, 9, 17]
    assert found.states_KS.tolist() == [[0, 7], [1, 6], [2, 5]]
    assert found.channels_K.dtype == found.states_KS.dtype == torch.int64


def test_many_small_changes_outweigh_a_large_one_only_by_their_squares() -> None:
    G_DN = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 1.1], [-0.6, 0.6, 0.6, -0.6]])
    assert maths.channel_scores(maths.magnitude(G_DN)).argsort(descending=True).tolist() == [2, 1, 0]


@given(st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=12), st.data())
def test_of_equal_scores_the_lower_index_goes_first(rows, data) -> None:
    if not any(map(any, rows)):
        return
    K, S = data.draw(st.integers(1, len(rows))), data.draw(st.integers(1, 4))
    found = maths.select(torch.tensor(rows), K, S)
    channels = sorted(sorted(range(len(rows)), key=lambda channel: (-sum(rows[channel]), channel))[:K])
    states = [sorted(sorted(range(4), key=lambda state: (-rows[channel][state], state))[:S]) for channel in channels]
    assert found.channels_K.tolist() == channels
    assert found.states_KS.tolist() == states


@given(st.integers(0, 99), st.floats(0.01, 1))
def test_auto_takes_the_fewest_that_hold_the_share(seed: int, share: float) -> None:
    score_DN = random(30, 6, seed=seed) ** 4
    found = maths.select(score_DN, "auto", "auto", share)
    score_D = score_DN.sum(1)
    held = score_D[found.channels_K]
    assert held.sum() >= share * score_D.sum() * (1 - 1e-12)
    assert held.sum() - held.min() < share * score_D.sum()
    chosen_KN = score_DN[found.channels_K]
    S = found.states_KS.shape[1]
    assert chosen_KN.gather(1, found.states_KS).sum() >= share * chosen_KN.sum() * (1 - 1e-12)
    assert chosen_KN.topk(S - 1).values.sum() < share * chosen_KN.sum() or S == 1


def test_auto_on_scores_that_say_it_plainly() -> None:
    score_DN = torch.zeros(10, 4)
    score_DN[6] = torch.tensor([6.0, 0, 2, 0])
    score_DN[2] = torch.tensor([0.0, 1, 0, 1])
    assert maths.select(score_DN, "auto", "auto", 0.8).channels_K.tolist() == [6]
    assert maths.select(score_DN, "auto", "auto", 0.81).channels_K.tolist() == [2, 6]
    assert maths.select(score_DN, "auto", "auto", 1.0).states_KS.tolist() == [[1, 3], [0, 2]]
    assert maths.select(score_DN, 1, "auto", 0.75).states_KS.tolist() == [[0]]


def test_what_is_added_to_a_channel_ranks_channels_and_no_state() -> None:
    score_DN = torch.tensor([[3.0, 1.0], [1.0, 2.0], [0.0, 0.5]])
    found = maths.select(score_DN, 1, 1, channel_extra_D=torch.tensor([0.0, 0.0, 9.0]))
    assert (found.channels_K.tolist(), found.states_KS.tolist()) == ([2], [[1]])


def test_scores_that_say_nothing_stop() -> None:
    with pytest.raises(CheckFailed, match=r"zero-gradient.*layer 3"):
        maths.select(torch.zeros(4, 2), 1, 1, layer="layer 3")
    for broken in (torch.nan, torch.inf):
        with pytest.raises(CheckFailed, match="non-finite-loss"):
            maths.select(torch.tensor([[1.0, broken]]), 1, 1)


def test_the_least_channels_are_pruned_never_a_chosen_one() -> None:
    score_D, channels_K = torch.tensor([0.0, 5.0, 1.0, 1.0, 2.0]), torch.tensor([0, 1])
    assert maths.least(score_D, channels_K, 1).tolist() == [2]
    assert maths.least(score_D, channels_K, 0.6).tolist() == [2, 3, 4]
    assert maths.least(score_D, channels_K, 0).tolist() == []
    with pytest.raises(UserError, match=r"method\.pruned means 4 channels, but 2"):
        maths.least(score_D, channels_K, 4)


# Scores.


def test_abar_ranks_otherwise_than_magnitude() -> None:
    """A fast channel forgets everything before and after; the same change of a slow one is seen."""
    A_log_DN, G_DN = torch.tensor([[4.0], [0.0]]), torch.tensor([[0.6], [0.5]])
    assert maths.select(maths.magnitude(G_DN), 1, 1).channels_K.tolist() == [0]
    assert maths.select(maths.abar_change(A_log_DN, G_DN, torch.zeros(2)), 1, 1).channels_K.tolist() == [1]


def test_abar_change_is_the_squared_difference_of_the_discretised_transition() -> None:
    A_log_DN, G_DN, bias_D = random(5, 3), 0.3 * random(5, 3, seed=1), random(5, seed=2)
    dt_D1 = (1 + bias_D.exp()).log()[:, None]
    expected_DN = ((-dt_D1 * (A_log_DN + G_DN).exp()).exp() - (-dt_D1 * A_log_DN.exp()).exp()) ** 2
    torch.testing.assert_close(maths.abar_change(A_log_DN, G_DN, bias_D), expected_DN)
    assert not maths.abar_change(A_log_DN, torch.zeros(5, 3), bias_D).any()
    small_DN = 1e-6 * G_DN
    slope_DN = dt_D1 * A_log_DN.exp() * (-dt_D1 * A_log_DN.exp()).exp()
    torch.testing.assert_close(
        maths.abar_change(A_log_DN, small_DN, bias_D).sqrt(), slope_DN * small_DN.abs(), rtol=1e-4, atol=0
    )


def test_a_warm_up_of_one_slow_channel_selects_it_in_s4() -> None:
    """The reference takes +exp(log_A_real) for what was before, and so ranks by decay instead of change."""
    log_real_DN = torch.linspace(2.0, -4.0, 8).double()[:, None].repeat(1, 4)  # the last channel decays slowest
    imag_DN = torch.pi * torch.arange(4.0).double().repeat(8, 1)
    after_log_DN = log_real_DN.clone()
    after_log_DN[7] += 0.5
    before_DN = torch.complex(-log_real_DN.exp(), imag_DN)
    after_DN = torch.complex(-after_log_DN.exp(), imag_DN)
    change_DN = maths.transition_change(before_DN, after_DN, torch.full((8,), 0.1, dtype=torch.float64))
    assert maths.select(change_DN, 1, 1).channels_K.tolist() == [7]
    assert maths.channel_scores(change_DN)[:7].eq(0).all()
    reference_DN = (torch.complex(-after_log_DN.exp(), imag_DN) - torch.complex(log_real_DN.exp(), imag_DN)).abs()
    assert reference_DN.sum(1).argmax() == 0


def test_taylor_is_the_first_order_effect_of_taking_a_parameter_away() -> None:
    A_log_DN, x_PD = random(6, 3).requires_grad_(), random(2 + 6, 6, seed=1).requires_grad_()
    A_DN = -A_log_DN.exp()
    A_DN.retain_grad()
    ((A_DN * random(6, 3, seed=2)).sum().sin() + (x_PD * random(8, 6, seed=3)).sum().cos()).backward()
    torch.testing.assert_close(maths.taylor_pairs(A_log_DN.grad), (A_DN * A_DN.grad).abs().detach())
    effect = (x_PD * x_PD.grad).tolist()
    expected_D = [sum(abs(effect[row][d]) for row in range(2, 8)) for d in range(6)]
    found_D = maths.taylor_columns(x_PD, x_PD.grad, states=3)
    torch.testing.assert_close(found_D, torch.tensor(expected_D, dtype=torch.float64))


# Deltas.


@st.composite
def selections(draw: st.DrawFn) -> tuple[tuple[int, int], maths.Selection]:
    D, states = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    K, S = draw(st.integers(1, D)), draw(st.integers(1, states))
    return (D, states), maths.select(random(D, states, seed=draw(st.integers(0, 99))).abs(), K, S)


@given(selections())
def test_the_delta_of_A_is_at_the_chosen_pairs_only(case) -> None:
    shape, chosen = case
    values_KS = random(*chosen.states_KS.shape, seed=1).requires_grad_()
    delta_DN = maths.scatter_A(values_KS, chosen.channels_K, chosen.states_KS, shape)
    pairs = [(d, n) for d, row in zip(chosen.channels_K, chosen.states_KS, strict=True) for n in row]
    assert torch.equal(torch.stack([delta_DN[d, n] for d, n in pairs]), values_KS.flatten())
    assert int(delta_DN.count_nonzero()) == values_KS.numel()
    dense_DN = random(*shape, seed=2)
    delta_DN.backward(dense_DN)
    assert torch.equal(values_KS.grad, dense_DN[chosen.channels_K].gather(1, chosen.states_KS))


@given(selections(), st.integers(1, 4))
def test_the_delta_of_x_proj_is_in_the_rows_of_B_and_C_and_the_chosen_columns(case, R) -> None:
    (D, states), chosen = case
    shape, K = (R + 2 * states, D), len(chosen.channels_K)
    B_NK, C_NK = (random(states, K, seed=seed).requires_grad_() for seed in (1, 2))
    delta_PD = maths.scatter_x(B_NK, C_NK, chosen.channels_K, shape)
    assert delta_PD.shape == shape
    assert torch.equal(delta_PD[R : R + states, chosen.channels_K], B_NK)
    assert torch.equal(delta_PD[R + states :, chosen.channels_K], C_NK)
    assert int(delta_PD.count_nonzero()) == 2 * states * K
    dense_PD = random(*shape, seed=3)
    delta_PD.backward(dense_PD)
    assert torch.equal(torch.cat([B_NK.grad, C_NK.grad]), dense_PD[R:, chosen.channels_K])


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_on_the_values_is_a_dense_step_with_a_masked_gradient(optimiser) -> None:
    chosen = maths.select(random(7, 4).abs(), 3, 2)
    base_DN, factor_DN = random(7, 4, seed=1), random(7, 4, seed=2)
    dense_DN = base_DN.clone().requires_grad_()
    mask_DN = maths.scatter_A(torch.ones(3, 2).double(), chosen.channels_K, chosen.states_KS, (7, 4))
    dense_DN.register_hook(lambda grad_DN: grad_DN * mask_DN)
    values_KS = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    sparse = lambda: base_DN + maths.scatter_A(values_KS, chosen.channels_K, chosen.states_KS, (7, 4))  # noqa: E731
    for parameter, weight in ((dense_DN, lambda: dense_DN), (values_KS, sparse)):
        # No decay: on a delta it pulls to the base, on a dense weight to zero.
        steps = optimiser([parameter], lr=0.1, weight_decay=0.0)
        for _ in range(3):
            steps.zero_grad()
            functional.silu(weight() * factor_DN).square().sum().backward()
            steps.step()
    torch.testing.assert_close(sparse(), dense_DN)
    assert not torch.equal(sparse(), base_DN)


@settings(max_examples=50)
@given(st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9)))
def test_jaccard(a: set[int], b: set[int]) -> None:
    found = maths.jaccard(a, b)
    assert found == maths.jaccard(b, a)
    assert (found == 1) == (a == b)
    assert 0 <= found <= 1
    assert (found == 0) == (not a & b and bool(a | b))


def test_jaccard_of_tensors_as_lists() -> None:
    assert maths.jaccard(torch.tensor([1, 2, 3]).tolist(), torch.tensor([2, 3, 4]).tolist()) == 0.5
