"""KPSVD's configuration, as it stands in a saved adapter and as a script of plain PEFT gives it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from peft import PeftConfig

from peftcli.methods.kpsvd.ranks import Rule
from peftcli.methods.peft_types import PeftName

if TYPE_CHECKING:
    from peftcli.methods.kpsvd.start import Start

NAME = "KPSVD"
RULE = ("energy", "energy_of", "elbow", "min_rank", "max_rank", "budget")


@dataclass
class KpsvdConfig(PeftConfig):
    """Kronecker-product SVD.

    Attributes:
        rank: Terms of each module; `auto` chooses them by the fields of `ranks.Rule`.
        rank_pattern: Terms by full module name, before `rank`; filled in when the adapter goes in.
        alpha: Scale of the terms is alpha / terms; None is a scale of 1.
        target_modules: As of every tuner.
        exclude_modules: As of every tuner.
        modules_to_save: As of every tuner.
        factors: `square` or `thin` where `splits` says nothing.
        splits: m, n, p, q by shape of the weight (`4096x4096`); filled in when the adapter goes in.
        sigma: Singular values `absorbed` in the factors, or `trained` beside them.
        base: `residual` takes the first terms out of the weight while there is one adapter; `delta` never.
        energy: As of `ranks.Rule`.
        energy_of: As of `ranks.Rule`.
        elbow: As of `ranks.Rule`.
        min_rank: As of `ranks.Rule`.
        max_rank: As of `ranks.Rule`.
        budget: As of `ranks.Rule`.
        iterations: Steps of the block Krylov method.
        seed: Of its random start.
        start: `svd` decomposes the weights; `file` leaves the factors zero, to be loaded.
        save_dtype: `float32` saves the factors as they are, `bfloat16` the first ones and their change in that type.
        starts: Where modules start, by name, if that is known already; no field, and not saved.
    """

    rank: int | Literal["auto"] = 2
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha: float | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    factors: Literal["square", "thin"] = "square"
    splits: dict[str, list[int]] = field(default_factory=dict)
    sigma: Literal["absorbed", "trained"] = "absorbed"
    base: Literal["residual", "delta"] = "residual"
    energy: float | None = None
    energy_of: Literal["weight", "candidates"] = "weight"
    elbow: Literal["chord", "curvature", "none"] = "chord"
    min_rank: int = 1
    max_rank: int = 32
    budget: int | None = None
    iterations: int = 12
    seed: int = 0
    start: Literal["svd", "file"] = "svd"
    save_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Name the type."""
        super().__post_init__()
        self.peft_type: Any = PeftName(NAME)
        self.starts: dict[str, Start] = {}
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # as PEFT's own tuners do

    @property
    def rule(self) -> Rule:
        """How `auto` chooses."""
        return Rule(**{name: getattr(self, name) for name in RULE})

    def scale(self, terms: int) -> float:
        """What the terms of a module with so many are multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / max(terms, 1)

    def to_dict(self) -> dict[str, Any]:
        """As it is saved: whatever the base looked like while training, the file fits the untouched one."""
        return {**asdict(self), "base": "delta", "start": "file"}
