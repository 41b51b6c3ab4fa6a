"""Mamba's roles, its exact state parameters whatever the type of the model, its classification head, its shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peftcli.config.compose import compose
from peftcli.config.errors import CheckFailed
from peftcli.config.schema import ModelConfig
from peftcli.models import loading, roles
from peftcli.models.mamba_mixer import Mixer
from peftcli.testing.tiny import mamba, mamba_shape
from tests.tiny import make_tokenizer

BASE = mamba()
SHAPE = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 300}
TOTALS = {
    "130m": 129_135_360,
    "370m": 371_516_416,
    "790m": 793_204_224,
    "1.4b": 1_372_178_432,
    "2.8b": 2_768_345_600,
}
"""Parameters of the published models, the tied embedding once."""


def found(*targets: str) -> list[str]:
    return roles.resolve(BASE.model, BASE.family, targets)


def test_every_parameter_has_a_role() -> None:
    assert all(roles.role_of(name, BASE.family) for name, _ in BASE.model.named_parameters())
    assert roles.role_of("backbone.layers.1.mixer.A_log", BASE.family) == "ssm.A"
    assert roles.role_of("base_model.model.backbone.layers.1.mixer.base_layer.D", BASE.family) == "ssm.D"
    assert roles.role_of("backbone.norm_f.weight", BASE.family) == "norm"


def test_all_is_the_linear_projections() -> None:
    linear = [n for n, m in BASE.model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert found("all") == linear
    assert len(found("ssm")) == 10
    assert found("ssm.conv") == [f"backbone.layers.{layer}.mixer.conv1d" for layer in (0, 1)]


def test_a_parameter_is_no_target() -> None:
    with pytest.raises(CheckFailed) as failure:
        found("ssm.A")
    assert failure.value.check == "dead-target"
    assert "roles of mamba: ssm.in, ssm.x, ssm.dt, ssm.out, ssm.conv, embed, norm, head, all" in failure.value.hint


@pytest.mark.parametrize("size", TOTALS)
def test_the_shipped_shapes_have_the_published_sizes(size: str) -> None:
    config = compose("mamba/glue-rte_lora", [f"model=mamba-{size}"]).config
    model = loading.load(config.model, "bf16", "causal-lm", None, meta=True).model
    assert sum(p.numel() for p in model.parameters()) == TOTALS[size]
    assert sum(isinstance(module, Mixer) for module in model.modules()) == model.config.num_hidden_layers


def dtypes(model: nn.Module) -> dict[torch.dtype, set[str]]:
    named: dict[torch.dtype, set[str]] = {}
    for name, parameter in model.named_parameters():
        named.setdefault(parameter.dtype, set()).add(name.rsplit(".", 1)[-1])
    return named


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    mamba(torch.float32).model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_state_parameters_are_read_in_full_precision(folder: Path, dtype: str) -> None:
    stored = load_file(folder / "model.safetensors")
    noise = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    stored["backbone.layers.0.mixer.A_log"] = noise
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    loaded = loading.load(ModelConfig(str(folder), "folder", dtype=dtype), "fp32", "causal-lm", None)
    assert dtypes(loaded.model)[torch.float32] == {"A_log", "D"}
    assert dtypes(loaded.model)[getattr(torch, dtype)] >= {"weight", "bias"}
    assert torch.equal(loaded.model.backbone.layers[0].mixer.A_log, noise)
    assert loaded.family.name == "mamba"


@pytest.mark.parametrize("meta", [False, True])
def test_state_parameters_are_drawn_in_full_precision(meta: bool) -> None:
    config = ModelConfig(name="tiny", weights="random", shape=SHAPE)
    model = loading.load(config, "bf16", "causal-lm", None, meta=meta).model
    assert dtypes(model)[torch.float32] == {"A_log", "D"}
    if not meta:
        A_log_N = torch.arange(1, 5).log()
        assert torch.equal(model.backbone.layers[1].mixer.A_log, A_log_N.expand(64, 4))


def test_random_weights_read_bytes_where_the_vocabulary_has_room() -> None:
    words = loading.load(ModelConfig("tiny", weights="random", shape=SHAPE), "fp32", "causal-lm", None).tokenizer
    text = "Zwei Bäume,  \n0"
    ids = words(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert max(words.get_vocab().values()) == 256
    assert words.decode(ids) == text
    assert words.pad_token_id == words.eos_token_id == 0
    small = ModelConfig("tiny", weights="random", shape={**SHAPE, "vocab_size": 256})
    assert loading.tokenizer(small) is None


@pytest.fixture
def classifier() -> nn.Module:
    config = ModelConfig(name="tiny", weights="random", shape=SHAPE)
    return loading.load(config, "fp32", "sequence-classification", ["a", "b", "c"]).model.eval()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_has_the_scores_it_has_alone(classifier: nn.Module, side: str) -> None:
    torch.manual_seed(0)
    rows = [torch.randint(1, 300, (length,)) for length in (9, 3, 6)]
    rows[1][-1] = 0  # a real token that is also what pads
    alone_BC = torch.cat(
        [classifier(input_ids=row[None], attention_mask=torch.ones(1, len(row))).logits for row in rows]
    )
    ids_BL, mask_BL = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(9 - len(row), 9) if side == "left" else slice(len(row))
        ids_BL[i, at], mask_BL[i, at] = row, 1
    logits_BC = classifier(input_ids=ids_BL, attention_mask=mask_BL).logits
    torch.testing.assert_close(logits_BC, alone_BC, rtol=1e-4, atol=1e-5)
    hidden_BLE = classifier.backbone(input_ids=rows[1][None])[0]
    torch.testing.assert_close(logits_BC[1], classifier.score(hidden_BLE[0, -1]), rtol=1e-4, atol=1e-5)


def test_a_half_precision_classifier_scores_float32_residuals() -> None:
    config = ModelConfig(name="tiny", weights="random", shape=mamba_shape(vocab_size=300).to_diff_dict() | SHAPE)
    model = loading.load(config, "bf16", "sequence-classification", ["a", "b"]).model
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.dtype == torch.bfloat16


def test_reading_does_not_scale_what_was_scaled_when_it_was_drawn(tmp_path: Path) -> None:
    model = mamba(torch.float32).model
    model.config.rescale_prenorm_residual = True  # Transformers 5.23 alone would divide out_proj by its root of layers
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    read = loading.load(ModelConfig(name=str(tmp_path), source="folder"), "fp32", "causal-lm", None).model
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
