"""Bases in few bits: loaded matrix by matrix, steady, read back as their own product sees them, counted, refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from peftcli.config.errors import UserError
from peftcli.config.schema import ModelConfig
from peftcli.models import loading, outline, packed, quantized
from peftcli.testing.tiny import llama_shape
from peftcli.training import checks, ledger

pytest.importorskip("bitsandbytes")

KINDS = pytest.mark.parametrize("kind", ["nf4", "int8"])
SHAPE = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "pad_token_id": 0,
}  # fmt: skip
RANDOM = ModelConfig(name="tiny", weights="random", shape=SHAPE)
IDS = torch.arange(1, 21).view(2, 10)
ROUNDED = {"nf4": 0.12, "int8": 0.008}
"""Most that packing may change a weight, as a share of its norm."""


def load(kind: str | None, precision: str = "fp32", meta: bool = False, **changes) -> nn.Module:
    config = replace(RANDOM, quantization=kind, **changes)
    return loading.load(config, precision, "causal-lm", None, meta=meta).model


def share(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


class _Contents(ledger.Ledger):
    """Books what has contents."""

    def _book(self, tensor: torch.Tensor, free: bool = False) -> None:
        super()._book(tensor, free or tensor.is_meta)


@KINDS
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_unpacked_weight_is_the_layers_own(kind: str, precision: str) -> None:
    model = load(kind, precision)
    layer = model.model.layers[0].mlp.up_proj
    weight = packed.weight(layer)
    assert (weight.dtype, tuple(weight.shape), packed.shape(layer)) == (torch.float32, (128, 64), (128, 64))
    x = torch.randn(7, 64, requires_grad=True)
    for training in (True, False, True):
        layer.train(training)
        y = layer(x)
        low = 0.01 if precision == "bf16" else 0.0
        assert share(y, x @ weight.T) < 1e-6 + low
        x.grad = None
        y.sum().backward()
        assert share(x.grad, weight.sum(0).expand(7, -1)) < 1e-6 + low
        assert torch.equal(packed.weight(layer), weight)


def test_left_to_itself_an_8_bit_layer_rounds_its_inputs_in_evaluation() -> None:
    layer = quantized._pack(nn.Linear(64, 64, bias=False).requires_grad_(False), "int8", torch.float32)
    x = torch.randn(7, 64)
    assert share(layer.train()(x), x @ packed.weight(layer).T) < 1e-6
    assert 1e-3 < share(layer.eval()(x), x @ packed.weight(layer).T) < 0.02


@KINDS
def test_a_checkpoint_is_packed_as_it_is_read(kind: str, wide_checkpoint: Path) -> None:
    whole = loading.load(ModelConfig(str(wide_checkpoint), source="folder"), "fp32", "causal-lm", None).model
    config = ModelConfig(str(wide_checkpoint), source="folder", quantization=kind)
    model = loading.load(config, "fp32", "causal-lm", None).model
    layers = dict(packed.layers(model))
    assert set(layers) == {n for n, m in whole.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    for name, layer in layers.items():
        assert share(packed.weight(layer), whole.get_submodule(name).weight) < ROUNDED[kind]
    assert packed.kind(model) == kind
    assert packed.kind(whole) is None
    assert packed.entries(model) == {name: p.numel() for name, p in whole.named_parameters()}
    assert torch.equal(model.lm_head.weight, whole.lm_head.weight)


@KINDS
@pytest.mark.parametrize("tied", [False, True])
def test_random_weights_are_packed_one_after_another(kind: str, tied: bool) -> None:
    shape = {**SHAPE, "tie_word_embeddings": tied}
    whole, model, again = (load(one, shape=shape) for one in (None, kind, kind))
    assert packed.entries(model) == packed.entries(whole)
    assert checks.fingerprints(model) == checks.fingerprints(again)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for name, buffer in whole.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer)
    for name, layer in packed.layers(model):
        expected = whole.get_submodule(name).weight.std()
        torch.testing.assert_close(packed.weight(layer).std(), expected, rtol=0.1, atol=0)


@KINDS
def test_drawing_never_holds_the_whole_model(kind: str) -> None:
    shape = {**SHAPE, "num_hidden_layers": 12, "vocab_size": 32}
    with _Contents() as book:
        model = load(kind, shape=shape)
    whole = 4 * sum(packed.entries(model).values())
    assert book.peak < 0.5 * whole


@KINDS
def test_training_goes_on_after_an_evaluation(kind: str) -> None:
    """With bf16 instructions bitsandbytes packs 4-bit weights anew for evaluation, into an order without a gradient."""
    model = load(kind, "bf16")
    before = checks.fingerprints(model)
    with torch.no_grad():
        model.eval()(input_ids=IDS)
    embedded = model.get_input_embeddings()(IDS).requires_grad_()
    model.train()(inputs_embeds=embedded).logits.float().sum().backward()
    assert embedded.grad.abs().sum() > 0
    assert checks.fingerprints(model) == before


@KINDS
def test_made_whole_again_it_is_a_plain_model(kind: str, tmp_path: Path) -> None:
    model = load(kind).eval()
    expected = model(input_ids=IDS).logits
    quantized.unpack(model)
    assert share(model(input_ids=IDS).logits, expected) < 1e-5
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert torch.equal(type(model).from_pretrained(tmp_path)(input_ids=IDS).logits, model(input_ids=IDS).logits)


@KINDS
def test_a_classification_head_stays_whole(kind: str) -> None:
    config = replace(RANDOM, quantization=kind)
    model = loading.load(config, "fp32", "sequence-classification", ["a", "b"]).model
    assert model.score.weight.dtype == torch.float32
    assert packed.kind(model) == kind


@KINDS
def test_an_outline_holds_the_bytes_of_the_real_thing(kind: str) -> None:
    shape = {**SHAPE, "hidden_size": 256, "intermediate_size": 512}
    real, drawn = load(kind, "bf16", shape=shape), load(kind, "bf16", meta=True, shape=shape)
    assert packed.entries(drawn) == packed.entries(real)
    assert packed.kind(drawn) == kind
    tensors = {t.data_ptr(): t.nbytes for n, t in real.state_dict().items() if "quant_state" not in n and t.numel() > 1}
    expected = sum(tensors.values()) + sum(b.nbytes for b in real.buffers())
    assert sum(ledger.held_by(drawn).values()) == pytest.approx(expected, rel=0.03)


def test_an_outline_computes_shapes() -> None:
    layer = outline.Outline(nn.Linear(8, 6, device="meta"), "nf4")
    x = torch.empty(2, 3, 8, device="meta", requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape


def test_what_cannot_be_packed_is_refused(monkeypatch, mamba_folder: Path) -> None:
    config = ModelConfig(str(mamba_folder), source="folder", quantization="nf4")
    with pytest.raises(UserError, match="Mamba's forward pass"):
        loading.load(config, "fp32", "causal-lm", None)
    shape = llama_shape(quantization_config={"quant_method": "gptq"})
    with pytest.raises(UserError, match="packed already, by gptq"):
        loading._check_packing(replace(RANDOM, quantization="nf4"), shape)
    with pytest.raises(UserError, match="has 96 inputs"):
        load("nf4", shape={**SHAPE, "intermediate_size": 96})
    load("int8", shape={**SHAPE, "intermediate_size": 96})
    quantized.check.cache_clear()
    with pytest.raises(UserError, match="cannot compute on meta here"):
        quantized.check("nf4", "meta")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'peftcli\[quantized\]'"):
        load("nf4")
