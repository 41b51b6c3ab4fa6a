"""SDT as pure functions: scores of (channel, state) pairs, the selection, its scattered deltas, what it trains.

A selector scores each pair of a layer; a channel's score is the sum over its states, plus what is said in the table:

    selector   score of the pair (d, n)                        added to the channel's score
    magnitude  G^2, G what a warm-up added to A_log            nothing
    abar       (abar_after - abar_before)^2                    nothing
    taylor     |A dL/dA| = |dL/dA_log|                         the sum of |W dL/dW| over W_B and W_C of the channel
    random     uniform in (0, 1)                               nothing

Source: Galim et al., Parameter-Efficient Fine-Tuning of State Space Models, ICML 2025 (arXiv 2410.09016), and its code.

Scores and selections are made in float64 on the CPU, wherever the model is.

Shapes: D channels, N states, R rank of dt, P = R + 2 N outputs of x_proj (dt, then B, then C); K chosen channels, S
chosen states of each, X pruned channels, M = 2 N.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from peftcli.config.errors import CheckFailed, Mistake, UserError

Amount = int | float | Literal["auto"]


@dataclass(frozen=True)
class Selection:
    """What is trained in one layer; indices rise, so that equal sets are equal tensors.

    Attributes:
        channels_K: Channels (int64).
        states_KS: States of each of them (int64).
    """

    channels_K: Tensor
    states_KS: Tensor


def first(channels: int, states: int, pruned: int) -> tuple[Selection, Tensor]:
    """The first channels, states and pruned channels: the sizes of a selection whose indices come from a file."""
    return Selection(torch.arange(channels), torch.arange(states).repeat(channels, 1)), torch.arange(pruned)


def count(amount: int | float, total: int, key: str = "channels") -> int:
    """How many of `total` an amount means.

    A share takes the published rule with `freeze = 1 - share`: `total - round(freeze * total)`, where Python's `round`
    takes a half to the even neighbour. The subtraction is decimal, on the digits as written: in binary 1 - 0.9 is
    0.09999999999999998. So a share of 0.01 counts exactly like a freeze ratio of 0.99 in the reference code.

    Args:
        amount: An int is a count; a float is a share and gives at least 1, unless it is 0.
        total: Of how many.
        key: The setting, for the message.

    Raises:
        UserError: A count above the total.
    """
    if isinstance(amount, int):
        if amount > total:
            raise UserError(Mistake(f"method.{key} is {amount}, but there are only {total}"))
        return amount
    freeze = float(1 - Decimal(repr(amount)))
    return max(1, total - round(freeze * total)) if amount else 0


def magnitude(G_DN: Tensor) -> Tensor:
    """The published score of each pair: the square of what the warm-up added to A_log (float64, [D, N])."""
    return _exact(G_DN) ** 2


def abar_change(A_log_DN: Tensor, G_DN: Tensor, dt_bias_D: Tensor) -> Tensor:
    """Squared change of exp(dt A) from A = -exp(A_log) to A = -exp(A_log + G) (float64, [D, N]).

    In S6 dt depends on the input; softplus(bias of dt_proj), its value where the input adds nothing, stands for it.
    """
    A_log_DN, G_DN = _exact(A_log_DN), _exact(G_DN)
    return transition_change(-A_log_DN.exp(), -(A_log_DN + G_DN).exp(), functional.softplus(_exact(dt_bias_D)))


def transition_change(before_DN: Tensor, after_DN: Tensor, dt_D: Tensor) -> Tensor:
    """|exp(dt after) - exp(dt before)|^2 of a diagonal A, real (S6) or complex (S4); real parts are negative."""
    dt_D1 = dt_D[:, None]
    return (torch.exp(dt_D1 * after_DN) - torch.exp(dt_D1 * before_DN)).abs() ** 2


def taylor_pairs(A_log_grad_DN: Tensor) -> Tensor:
    """First-order change of the loss where A of a pair goes to zero: |A dL/dA| = |dL/dA_log| (float64, [D, N])."""
    return _exact(A_log_grad_DN).abs()


def taylor_columns(x_weight_PD: Tensor, x_grad_PD: Tensor, states: int) -> Tensor:
    """The same for the W_B and W_C of each channel: |W dL/dW| over the last 2 N rows of x_proj (float64, [D])."""
    return (_exact(x_weight_PD) * _exact(x_grad_PD)).abs()[-2 * states :].sum(0)


def channel_scores(score_DN: Tensor, channel_extra_D: Tensor | None = None) -> Tensor:
    """The score of each channel: the sum over its states, plus `channel_extra_D` (float64, [D])."""
    score_D = _exact(score_DN).sum(1)
    return score_D if channel_extra_D is None else score_D + _exact(channel_extra_D)


def select(
    score_DN: Tensor,
    channels: Amount,
    states: Amount,
    score_share: float = 0.5,
    channel_extra_D: Tensor | None = None,
    layer: str = "a layer",
) -> Selection:
    """The channels with the largest scores and, in each of them, the states with the largest scores.

    Of equal scores the lower index goes first (a stable sort). `auto` takes the fewest channels that together hold
    `score_share` of the layer's score, and the fewest states such that the best S of each chosen channel together hold
    `score_share` of those channels' pair scores: one S for the layer, since its values are one rectangle [K, S].

    Args:
        score_DN: Score of each pair, none negative.
        channels: Count, share or `auto`; see `count`.
        states: The same for the states of a channel.
        score_share: In (0, 1].
        channel_extra_D: Added to the channels' scores; ranks no state.
        layer: Its name, for the message.

    Raises:
        UserError: More channels or states than the layer has.
        CheckFailed: `non-finite-loss`: a score is not finite; `zero-gradient`: none is above zero.
    """
    score_D = channel_scores(score_DN, channel_extra_D)
    if not score_D.isfinite().all():
        raise CheckFailed("non-finite-loss", f"a selection score of {layer} is infinite or not a number")
    if not score_D.any():
        raise CheckFailed("zero-gradient", f"every selection score of {layer} is zero, so nothing is chosen there")
    sorted_D, order_D = score_D.sort(descending=True, stable=True)
    K = _fewest(sorted_D, score_share) if channels == "auto" else count(channels, len(score_D))
    channels_K = order_D[:K].sort().values
    sorted_KN, order_KN = _exact(score_DN)[channels_K].sort(dim=1, descending=True, stable=True)
    S = _fewest(sorted_KN.sum(0), score_share) if states == "auto" else count(states, sorted_KN.shape[1], "states")
    return Selection(channels_K, order_KN[:, :S].sort(dim=1).values)


def least(score_D: Tensor, channels_K: Tensor, pruned: int | float) -> Tensor:
    """The channels to prune: those with the smallest scores that were not chosen; of equals the lower index.

    Returns:
        pruned_X: Rising indices (int64); empty for 0.

    Raises:
        UserError: Not enough channels are left beside the chosen ones.
    """
    D, K = len(score_D), len(channels_K)
    X = count(pruned, D, "pruned")
    if X > D - K:
        what = f"method.pruned means {X} channels, but {K} of a layer's {D} are trained"
        raise UserError(Mistake(what, allowed=(f"at most {D - K}",)))
    left_D = _exact(score_D).index_fill(0, channels_K, torch.inf)
    return left_D.sort(stable=True).indices[:X].sort().values


def scatter_A(values_KS: Tensor, channels_K: Tensor, states_KS: Tensor, shape: tuple[int, int]) -> Tensor:
    """The delta of A_log ([D, N] = `shape`): the values at the chosen pairs, else zero; gradients reach the values."""
    return values_KS.new_zeros(shape).index_put((channels_K[:, None], states_KS), values_KS)


def scatter_x(B_NK: Tensor, C_NK: Tensor, channels_K: Tensor, shape: tuple[int, int]) -> Tensor:
    """The delta of x_proj's weight ([P, D] = `shape`): W_B and W_C of the chosen channels; the rows of dt stay zero."""
    values_MK = torch.cat([B_NK, C_NK])
    delta_MD = values_MK.new_zeros(len(values_MK), shape[1]).index_copy(1, channels_K, values_MK)
    return functional.pad(delta_MD, (0, 0, shape[0] - len(values_MK), 0))


def jaccard(a: Iterable[int], b: Iterable[int]) -> float:
    """Overlap of two sets of indices, |a and b| / |a or b|: 1 where they are equal, also where both are empty."""
    one, other = set(a), set(b)
    return len(one & other) / len(one | other) if one | other else 1.0


@dataclass(frozen=True)
class Parameters:
    """Trained numbers of a whole model.

    Attributes:
        A: Of A_log.
        B: Of W_B.
        C: Of W_C.
        lora: Of LoRA.
        G: The warm-up's D N per layer; not trained afterwards, though the reference's counter has them.
    """

    A: int
    B: int
    C: int
    lora: int
    G: int

    @property
    def trained(self) -> int:
        """What is trained after the selection."""
        return self.A + self.B + self.C + self.lora

    @property
    def reference(self) -> int:
        """What the reference code prints: its G still asks for gradients after the selection, unused."""
        return self.trained + self.G


def parameters(
    D: int, N: int, R: int, d: int, layers: int, K: int, S: int, rank: int, lora_targets: Iterable[str]
) -> Parameters:
    """Count what SDT trains with K channels of S states in each layer; `d` is the width of the model."""
    widths = {"ssm.in": d + 2 * D, "ssm.x": D + R + 2 * N, "ssm.dt": R + D, "ssm.out": D + d}
    lora = rank * sum(widths[target] for target in lora_targets)
    return Parameters(*(layers * one for one in (K * S, N * K, N * K, lora, D * N)))


def _fewest(falling: Tensor, share: float) -> int:
    """How many of the first values hold `share` of the sum of all; at least 1."""
    held = falling.cumsum(0)
    return 1 + int((held < share * held[-1]).sum())


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)
