"""The names of the samples and what each is: enough to check a recipe without what fetches and converts them."""

from __future__ import annotations

from typing import Literal

KINDS: dict[str, Literal["weights", "data"]] = {
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
    "python-stdlib": "data",
}


def of_kind(kind: str) -> tuple[str, ...]:
    """The samples that are weights, or data."""
    return tuple(name for name, other in KINDS.items() if other == kind)
