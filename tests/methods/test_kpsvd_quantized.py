"""KPSVD where a weight cannot change: packed in few bits, or shared with the embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from peftcli.artifacts import merge
from peftcli.config import peft_types
from peftcli.config.catalog import settings_class
from peftcli.config.errors import UserError
from peftcli.config.schema import ModelConfig
from peftcli.methods import gradients, registry
from peftcli.methods.contract import Calibration
from peftcli.methods.kpsvd.config import KpsvdConfig
from peftcli.methods.kpsvd.layer import KpsvdLayer
from peftcli.methods.kpsvd.tuner import PEFT_TYPE
from peftcli.methods.peft_types import register
from peftcli.models import loading, packed, quantized
from peftcli.testing.rows import nudge, trained
from peftcli.training import checks
from tests.methods.test_peft_tuners import ARGS, TARGETS

register(PEFT_TYPE)
SHAPE = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 300,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.15,
}  # fmt: skip
IDS = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(0))
IDS[0, :2] = torch.tensor(ARGS["TRAINABLE_TOKENS"]["token_indices"])
TIED = {**SHAPE, "tie_word_embeddings": True}


@pytest.fixture(params=["nf4", "int8"])
def kind(request) -> str:
    pytest.importorskip("bitsandbytes")
    return request.param


def load(kind: str | None, shape: dict[str, Any] = SHAPE, precision: str = "fp32") -> Any:
    config = ModelConfig(name="tiny", weights="random", shape=shape, quantization=kind)
    return loading.load(config, precision, "causal-lm", None)


def loss(model: Any, batch: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


CALIBRATION = Calibration([[{"input_ids": IDS}]] * 2, loss, 2, 3)


def attach(loaded: Any, name: str = "kpsvd", **settings: Any) -> tuple[Any, Any]:
    """The model with the adapter in it, and its method."""
    method = registry.find(name)(settings_class(name)(**settings))
    torch.manual_seed(0)
    model: Any = method.attach(loaded.model, loaded.family, CALIBRATION)
    for stage in method.stages(3):
        if stage.start:
            stage.start(model)
    return model.eval(), method


def layers(model: Any) -> list[KpsvdLayer]:
    return [module for module in model.modules() if isinstance(module, KpsvdLayer)]


def step(model: Any, method: Any) -> None:
    model.train()
    optimiser = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    total, extra = loss(model), method.penalty(model)
    (total if extra is None else total + extra).backward()
    optimiser.step()
    model.eval()


SETTINGS = [
    {"rank": 2}, {"rank": "auto"}, {"rank": 2, "source": "gradient", "sigma": "trained", "alpha": 4.0},
    {"rank": "auto", "energy": 0.4, "targets": ["mlp"]},
]  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_starts_as_the_packed_base_and_only_the_factors_move(kind, settings, precision):
    loaded = load(kind, precision=precision)
    with torch.no_grad():
        before = loaded.model.eval()(input_ids=IDS).logits
    model, method = attach(loaded, **settings)
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert f"a weight in {kind} would be rounded again" in " ".join(method.notes)
    frozen = {name: value for name, value in checks.fingerprints(model).items() if "kpsvd" not in name}
    step(model, method)
    assert all(p.grad.any() for p in trained(model).values())
    now = checks.fingerprints(model)
    assert frozen == {name: now[name] for name in frozen}
    method.finish(model)
    assert not torch.equal(model(input_ids=IDS).logits, before)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, before)


def test_its_terms_are_those_of_the_unpacked_weight(kind):
    model, _ = attach(load(kind), rank=2)
    layer = layers(model)[0]
    whole = load(kind).model
    quantized.unpack(whole)
    plain: Any = get_peft_model(whole, KpsvdConfig(rank=2, target_modules=["q_proj", "v_proj"], base="delta"))
    other = layers(plain)[0]
    for key, tensor in layer.first("default").items():
        torch.testing.assert_close(tensor, other.first("default")[key], rtol=1e-3, atol=1e-4)
    nudge(model)
    with pytest.raises(UserError, match="few bits without rounding it again"):
        model.merge_adapter()


@pytest.mark.parametrize("bits", [None, "nf4"])
def test_gradients_through_a_layer_are_those_of_its_weight(bits):
    """Of a packed weight, those of the same model made whole; the loss of calibration rows is the same too."""
    if bits:
        pytest.importorskip("bitsandbytes")
    loaded = load(bits)
    names = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")]
    through = gradients.mean(loaded.model, {name: loaded.model.get_submodule(name) for name in names}, CALIBRATION, 2)
    assert not any(p.requires_grad or p.grad is not None for p in loaded.model.parameters())
    if bits:
        quantized.unpack(loaded.model)
    weights = {name: loaded.model.get_submodule(name).weight for name in names}
    torch.testing.assert_close(through, gradients.mean(loaded.model, weights, CALIBRATION, 2), rtol=1e-3, atol=1e-6)


def assert_file_fits(model: Any, kind: str, folder: Path) -> None:
    """A trained adapter's file gives the packed base the same answers, and the whole one nearly."""
    nudge(model)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(load(kind).model, str(folder)).eval()
    assert torch.equal(again(input_ids=IDS).logits, expected)
    whole = load(kind).model
    quantized.unpack(whole)
    found = PeftModel.from_pretrained(whole, str(folder)).eval()(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_file_fits_the_packed_and_the_whole_base(kind, tmp_path):
    assert_file_fits(attach(load(kind), rank=2)[0], kind, tmp_path)


@pytest.mark.parametrize("tuner", sorted(peft_types.PACKED["nf4"] | peft_types.PACKED["int8"]))
def test_pefts_tuners_train_on_it_and_merge_into_the_whole_base(kind, tuner):
    if tuner not in peft_types.PACKED[kind]:
        pytest.skip("refused by a rule")
    loaded = load(kind)
    settings = {"type": tuner, "args": ARGS.get(tuner, {}), "targets": TARGETS.get(tuner, [])}
    with torch.no_grad():
        base = loaded.model.eval()(input_ids=IDS).logits
    model, method = attach(loaded, "peft", **settings)
    if method.capabilities.identity_at_start:
        start = model(input_ids=IDS).logits[:, -9:]
        assert checks.identity_start(base, start, "fp32") < 1e-4
    step(model, method)
    assert all(p.grad is not None for p in trained(model).values())
    if not method.capabilities.merges:
        return
    nudge(model)
    method.finish(model)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        merged = merge.merged_in_float32(merge.on_whole_base(model))
        found = merged(input_ids=IDS).logits
    assert packed.kind(merged) is None
    assert (found - expected).norm() < 1e-3 * expected.norm()


class TestTied:
    """The output layer is the embedding too: taking terms out of its weight would move the embedding."""

    @pytest.mark.parametrize("settings", [{"rank": 2}, {"rank": "auto"}, {"rank": 2, "source": "gradient"}], ids=str)
    def test_the_embedding_stays_and_the_start_is_the_base(self, settings):
        loaded = load(None, TIED)
        with torch.no_grad():
            before = loaded.model.eval()(input_ids=IDS).logits
        embedding = loaded.model.model.embed_tokens.weight
        bits = embedding.clone()
        model, method = attach(loaded, targets=["head", "attention.q"], **settings)
        assert "residual is delta in 1 modules (lm_head): a weight that is another" in " ".join(method.notes)
        assert torch.equal(embedding, bits)
        torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=1e-5, atol=1e-5)
        assert {layer.takes_out["default"] for layer in layers(model)} == {True, False}
        step(model, method)
        method.finish(model)
        assert torch.equal(embedding, bits)

    def test_the_gradient_is_the_layers_own(self):
        loaded, untied = load(None, TIED), load(None)
        untied.model.load_state_dict(loaded.model.state_dict())
        own = gradients.mean(untied.model, {"lm_head": untied.model.lm_head.weight}, CALIBRATION, 1)
        through = gradients.mean(loaded.model, {"lm_head": loaded.model.lm_head}, CALIBRATION, 1)
        torch.testing.assert_close(through, own)

    @pytest.mark.parametrize("method", ["kpsvd", "lora"])
    def test_merging_unties(self, method, tmp_path):
        loaded = load(None, TIED)
        model, made = attach(loaded, method, targets=["head"])
        nudge(model)
        made.finish(model)
        with torch.no_grad():
            expected = model(input_ids=IDS).logits
        embedding = loaded.model.model.embed_tokens.weight.clone()
        merged = merge.merged_in_float32(model)
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(merged.model.embed_tokens.weight, embedding)
        merged.save_pretrained(tmp_path)
        again = type(merged).from_pretrained(tmp_path)
        assert torch.equal(again(input_ids=IDS).logits, merged(input_ids=IDS).logits)


def test_a_second_adapter_of_the_same_name_is_refused(tmp_path):
    model, _ = attach(load(None), rank=2)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'default' already exists"):
        model.add_adapter("default", KpsvdConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="named 'default' is on this model already"):
        model.load_adapter(str(tmp_path), "default")
    loaded = PeftModel.from_pretrained(load(None).model, str(tmp_path))
    with pytest.raises(UserError, match="named 'default' is on this model already"):
        loaded.load_adapter(str(tmp_path), "default")
    loaded.load_adapter(str(tmp_path), "again")
    loaded.delete_adapter("default")
    loaded.load_adapter(str(tmp_path), "default")
