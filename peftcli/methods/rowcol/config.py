"""The adapter's configuration, as it stands in a saved one and as a script of plain PEFT gives it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from peft import PeftConfig

from peftcli.methods.peft_types import PeftName

if TYPE_CHECKING:
    from peftcli.methods.rowcol.bases import Basis

NAME = "ROWCOL"


@dataclass
class RowcolConfig(PeftConfig):
    """Cores between a basis of the column space and one of the row space.

    Attributes:
        rank: Directions of each module's bases, at most the smaller side of its weight.
        rank_pattern: The same by full module name, before `rank`; filled in when the adapter goes in.
        alpha: Scale of the change is alpha / rank; None is a scale of 1.
        target_modules: As of every tuner.
        exclude_modules: As of every tuner.
        modules_to_save: As of every tuner.
        owners: Modules whose row-space basis is the first columns of another's, which alone is saved.
        start: `weight` takes the bases from the weights; `file` leaves them zero, to be loaded.
        save_dtype: Type of the saved bases.
        bases: Where they are known already, by module name; no field, and not saved.
    """

    rank: int = 32
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha: float | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    owners: dict[str, str] = field(default_factory=dict)
    start: Literal["weight", "file"] = "weight"
    save_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Name the type."""
        super().__post_init__()
        self.peft_type: Any = PeftName(NAME)
        self.bases: dict[str, Basis] = {}
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # as PEFT's own tuners do

    def scale(self, rank: int) -> float:
        """What a change of this rank is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / rank

    def to_dict(self) -> dict[str, Any]:
        """As it is saved: its file has the bases."""
        return {**asdict(self), "start": "file"}
