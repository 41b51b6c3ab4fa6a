"""The arithmetic that is chosen where the recipe leaves it open."""

from __future__ import annotations

import pytest
import torch

from peftcli.config.errors import UserError
from peftcli.models import precision


@pytest.mark.parametrize(
    ("bf16", "amx", "expected"), [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")]
)
def test_auto_on_a_cpu(bf16: bool, amx: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert precision.choose("auto", "cpu") == expected


def test_what_the_recipe_says_goes() -> None:
    assert precision.choose("bf16", "cpu") == "bf16"
    assert precision.choose("fp32", "cuda") == "fp32"
    assert precision.choose("fp16", torch.device("cuda", 1)) == "fp16"
    with pytest.raises(UserError, match="fp16 does not train on a CPU"):
        precision.choose("fp16", "cpu")
