"""Which way of computing the same numbers is cheaper, from shapes alone.

A sum of Kronecker products can be applied through its factors, with small matrix products for every token and term,
or be formed as a matrix once for all tokens. Costs are in multiplications of a large matrix product; the other kinds
of work were timed against it on a CPU core with bf16 instructions, at 192 x 576 to 4096 x 4096. Only their order
matters.
"""

from __future__ import annotations

from functools import cache

from peftcli.methods.kpsvd.maths import LARGE
from peftcli.methods.kpsvd.shapes import Split

TERM = 4
"""Adding a term to an entry of a matrix that is formed."""
APPLIED = 3
"""A multiplication in the small products through the factors, moving of their results included."""
LEARNT = 6
"""The same for the gradients of the factors, which sum over the tokens."""
CALLS = 2_000_000
"""The calls that working through the factors takes beyond the others."""


@cache
def forms_product(tokens: int, terms: int, split: Split, folds: bool) -> bool:
    """Whether to form the sum of the terms for y = x Wᵀ, and again for the gradient of x.

    Args:
        tokens: Rows of x.
        terms: Terms of the sum.
        split: Shapes of their factors.
        folds: Whether the formed sum goes into the weight, so that its product costs nothing more.
    """
    entries = split.rows * split.columns
    formed = entries * (_entry(entries) + TERM * terms) + (0 if folds else entries * tokens)
    return formed <= tokens * terms * split.macs * APPLIED + CALLS


@cache
def forms_gradient(tokens: int, terms: int, split: Split) -> bool:
    """Whether to form the gradient of the whole matrix, gᵀ x, and take those of the factors from it."""
    entries = split.rows * split.columns
    m, n, p, q = split
    through = 2 * m * q * (n + p)
    return entries * (tokens + _entry(entries) + TERM * terms) <= tokens * terms * through * LEARNT + CALLS


def _entry(entries: int) -> int:
    """Writing an entry of a matrix that is formed: in the cache, or in memory."""
    return 100 if entries <= LARGE else 400
