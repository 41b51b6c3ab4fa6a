"""A matrix with many zeros as it stands in a file: its other values, and where they are.

Two forms, whichever is smaller: a bit for each entry, or the distance from each value to the one before it in the
smallest type that holds the longest. A matrix that neither makes smaller is written as it is. Exact zeros alone are
left out, so reading gives back every bit.

Shapes: N entries, K values.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

VALUES, BITS, GAPS = "values", "bits", "gaps"
GAP_TYPES = (torch.uint8, torch.int16, torch.int32)


def encode(matrix: Tensor) -> dict[str, Tensor]:
    """The parts of a matrix by name: `values` [K] with `bits` [N / 8] or `gaps` [K]; nothing where it stays whole."""
    if matrix.is_meta or isinstance(matrix, FakeTensor):  # only its size is asked for
        return {}
    flat_N = matrix.flatten()
    on_N = flat_N != 0
    values_K = flat_N[on_N]
    found = min((_bits(on_N), _gaps(on_N)), key=_size)
    parts = {VALUES: values_K, **found}
    return parts if _size(parts) < _size({VALUES: flat_N}) else {}


def decode(parts: dict[str, Tensor], shape: torch.Size) -> Tensor:
    """The matrix that `encode` took apart.

    Raises:
        ValueError: The parts do not belong together, or are not of a matrix of this shape.
    """
    values_K = parts[VALUES]
    where = _from_bits(parts[BITS], shape.numel()) if BITS in parts else _from_gaps(parts[GAPS])
    if len(where) != len(values_K) or (len(where) and not 0 <= int(where[-1]) < shape.numel()):
        raise ValueError(f"{len(values_K)} values and {len(where)} places do not make a matrix of {list(shape)}")
    flat_N = values_K.new_zeros(shape.numel())
    flat_N[where] = values_K
    return flat_N.view(shape)


def _bits(on_N: Tensor) -> dict[str, Tensor]:
    padded = torch.nn.functional.pad(on_N, (0, -len(on_N) % 8)).view(-1, 8)
    return {BITS: (padded * _powers(on_N)).sum(1).to(torch.uint8)}


def _from_bits(bits: Tensor, entries: int) -> Tensor:
    if len(bits) != -(-entries // 8):
        raise ValueError(f"{len(bits)} bytes of bits are not for {entries} entries")
    on_N = (bits[:, None].int() & _powers(bits)).flatten() != 0
    return on_N.nonzero().flatten()


def _powers(like: Tensor) -> Tensor:
    return 2 ** torch.arange(8, dtype=torch.int32, device=like.device)


def _gaps(on_N: Tensor) -> dict[str, Tensor]:
    where_K = on_N.nonzero().flatten()
    gaps_K = where_K.diff(prepend=where_K.new_full((1,), -1)) - 1
    largest = int(gaps_K.max()) if len(gaps_K) else 0
    return {GAPS: gaps_K.to(next(kind for kind in GAP_TYPES if largest <= torch.iinfo(kind).max))}


def _from_gaps(gaps_K: Tensor) -> Tensor:
    if len(gaps_K) and int(gaps_K.min()) < 0:
        raise ValueError("the places of the values do not rise")
    return (gaps_K.long() + 1).cumsum(0) - 1


def _size(parts: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in parts.values())
