"""The names of the samples and of what is bundled, and what each is: enough to check a recipe without reading them."""

from __future__ import annotations

from typing import Literal

Kind = Literal["weights", "data"]

KINDS: dict[str, Kind] = {
    "smollm2-135m": "weights",
    "vit-s14": "weights",
    "resnet50-thin": "weights",
    "reuters-r8": "data",
    "wordnet": "data",
    "gsm8k-test": "data",
    "elpv": "data",
    "digits": "data",
    "emoji-google": "data",
    "emoji-twitter": "data",
    "glyphs": "data",
    "python-stdlib": "data",
}
"""To be fetched once."""
BUNDLED: dict[str, Kind] = {"mamba-wordnet": "weights", "wordnet-categories": "data"}
"""Inside the package."""
BUNDLED_LICENCE = "WordNet 3.0 licence: may be redistributed with its notice (LICENSE beside it)"


def of_kind(kind: str, kinds: dict[str, Kind] = KINDS) -> tuple[str, ...]:
    """The names of weights, or of data: of samples, or of what is bundled."""
    return tuple(name for name, other in kinds.items() if other == kind)
