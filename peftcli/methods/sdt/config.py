"""The adapter's configuration, as `adapter_config.json` holds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from peftcli.methods.peft_types import PeftName

NAME = "SDT"


@dataclass
class SdtConfig(PeftConfig):
    """Of an SDT adapter. Its targets are whole state-space blocks.

    Attributes:
        target_modules: Names of the blocks.
        exclude_modules: As in PEFT.
        modules_to_save: Modules that are trained and saved whole, as in PEFT.
        layers_to_transform: As in PEFT.
        layers_pattern: As in PEFT.
        r: Rank of LoRA.
        alpha: LoRA is scaled by alpha / r.
        dropout: Share of LoRA's inputs that is dropped while training.
        projections: Names of the block's sub-modules that LoRA adapts.
        sizes: By block: chosen channels, states of each, pruned channels. Empty until the selection is made.
    """

    target_modules: Any = None
    exclude_modules: Any = None
    modules_to_save: list[str] | None = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    r: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    projections: list[str] = field(default_factory=lambda: ["out_proj"])
    sizes: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type: Any = PeftName(NAME)
