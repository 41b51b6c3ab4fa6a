"""A weight that terms were added to in place, and the way back to its own bits.

Adding and subtracting again leaves a few entries one rounding off. Which ones is known beforehand, since the sum of
the terms comes out in the same bits everywhere (`maths.total`): their own values are kept, a few in a hundred, instead
of a second copy of the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftcli.methods.kpsvd.maths import total

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Shift:
    """Terms added to a weight.

    Args:
        weight: Changed in place, any shape of O x I entries.
        U_KMN: Left factors; copied.
        V_KPQ: Right factors; copied.
        sign: 1 adds, -1 subtracts.
        safe: Leave the weight alone where the result is not finite.

    Raises:
        ValueError: With `safe`, the result is not finite.
    """

    def __init__(self, weight: Tensor, U_KMN: Tensor, V_KPQ: Tensor, sign: int, safe: bool = False):
        self._dtype = weight.dtype
        wide = torch.float32 if weight.element_size() < 4 else torch.float64
        self._U, self._V, self._sign = U_KMN.detach().to(wide, copy=True), V_KPQ.detach().to(wide, copy=True), sign
        before = weight.detach()
        after = self._moved(before, sign)
        if safe and not torch.isfinite(after).all():
            raise ValueError("NaNs or infinities in the merged weights; the adapter seems to be broken")
        back = self._moved(after, -sign)
        bits = BITS[weight.element_size()]
        places = (back.view(bits) != before.view(bits)).flatten().nonzero().flatten()
        self._values = before.flatten()[places]
        self._places = places.to(torch.int32) if weight.numel() < 2**31 else places
        weight.data.copy_(after)

    @property
    def kept(self) -> int:
        """Entries whose values are kept."""
        return len(self._places)

    @torch.no_grad()
    def undo(self, weight: Tensor) -> None:
        """Give the weight its own bits back, in place; one that was cast to a wider type meanwhile, their values."""
        back = self._moved(weight.detach().to(self._dtype), -self._sign)
        back.view(-1)[self._places.long().to(back.device)] = self._values.to(back.device)
        weight.data.copy_(back)

    def _moved(self, weight: Tensor, sign: int) -> Tensor:
        sum_OI = total(self._U.to(weight.device), self._V.to(weight.device)).view(weight.shape)
        return (weight.to(sum_OI.dtype) + sign * sum_OI).to(self._dtype)
