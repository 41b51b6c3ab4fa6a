"""The adapter's configuration, as `adapter_config.json` holds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig

from peftcli.methods.peft_types import PeftName

NAME = "SPARSE_ADAPTER"


@dataclass
class SparseAdapterConfig(PeftConfig):
    """Of an adapter of bottleneck modules.

    Attributes:
        r: Units of a module that `units` does not name.
        units: The units that each module has left, as indices from 0 to r - 1, by its full name in the base.
        target_modules: Modules of the base that get one; names as in PEFT.
        exclude_modules: As in PEFT.
        modules_to_save: Modules that are trained and saved whole, as in PEFT.
        layers_to_transform: As in PEFT.
        layers_pattern: As in PEFT.
        placement: `sequential` reads what the base's module puts out, `parallel` what it reads.
        activation: `gelu`, `relu` or `linear`; linear has no biases.
        gate: A factor for each unit.
        norm: LayerNorm over the channels of what is read.
        dropout: Share of the units dropped in a training step.
        save_dtype: Type of the saved numbers.
    """

    r: int = 64
    units: dict[str, list[int]] = field(default_factory=dict)
    target_modules: Any = None
    exclude_modules: Any = None
    modules_to_save: list[str] | None = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    placement: Literal["sequential", "parallel"] = "sequential"
    activation: Literal["gelu", "relu", "linear"] = "gelu"
    gate: bool = True
    norm: bool = False
    dropout: float = 0.0
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type: Any = PeftName(NAME)
