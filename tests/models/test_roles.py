"""Roles find the modules that recipes mean, and say what there is where they find none."""

from __future__ import annotations

import pytest
import torch

from peftcli.config.errors import CheckFailed, UserError
from peftcli.models import families, roles
from peftcli.models.family import Family
from peftcli.testing.rows import Row
from peftcli.testing.tiny import llama

BASE = llama()


def found(*targets: str) -> list[str]:
    return roles.resolve(BASE.model, BASE.family, targets)


def test_every_module_type_has_a_role_but_containers() -> None:
    leaves = [name for name, module in BASE.model.named_modules() if not list(module.children())]
    without = {name.rsplit(".", 1)[-1] for name in leaves if not roles.role_of(name, BASE.family)}
    assert without == {"act_fn", "rotary_emb"}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("attention.q", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        ("mlp.down", ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]),
        ("down_proj", ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]),
        ("mlp.down_proj", ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]),
        (r".*layers\.1\.mlp\.(up|gate)_proj", ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]),
        ("model.layers.0.self_attn.o_proj", ["model.layers.0.self_attn.o_proj"]),
        ("head", ["lm_head"]),
        ("embed", ["model.embed_tokens"]),
    ],
)
def test_target(target: str, expected: list[str]) -> None:
    assert found(target) == expected


def test_groups_of_roles() -> None:
    assert len(found("attention")) == 8
    assert len(found("mlp")) == 6
    assert found("all") == found("attention", "mlp")
    linear = [n for n, m in BASE.model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert found("all") == linear
    assert len(found("norm")) == 5


def test_modules_come_once_and_in_the_models_order() -> None:
    assert found("attention.v", "q_proj", "attention.q") == [
        f"model.layers.{layer}.self_attn.{kind}_proj" for layer in (0, 1) for kind in "qv"
    ]


@pytest.mark.parametrize(("target", "close"), [("attentoin.q", "attention.q"), ("q_porj", "q_proj")])
def test_dead_target_names_what_exists(target: str, close: str) -> None:
    with pytest.raises(CheckFailed) as failure:
        found("attention.q", target)
    assert failure.value.check == "dead-target"
    assert f"did you mean: {close}" in failure.value.hint
    assert "mlp.gate" in failure.value.hint
    assert "gate_proj" in failure.value.hint


def test_a_broken_expression_is_a_dead_target() -> None:
    with pytest.raises(CheckFailed, match="dead-target"):
        found("layers.(0")


def test_a_family_without_roles_takes_module_names() -> None:
    bare = Family("gpt9", ("gpt9",))
    assert len(roles.resolve(BASE.model, bare, ["q_proj"])) == 2
    with pytest.raises(CheckFailed) as failure:
        roles.resolve(BASE.model, bare, ["attention.q"])
    assert "no roles are known for gpt9" in failure.value.hint


def test_role_of_parameters_inside_wrappers() -> None:
    _, model, _ = Row("lora", {"targets": ["all"], "use_dora": True}, architecture="sequence-classification").attached()
    seen = {name: roles.role_of(name, BASE.family) for name, _ in model.named_parameters()}
    layer = "base_model.model.model.layers.1"
    assert seen[f"{layer}.self_attn.q_proj.lora_A.default.weight"] == "attention.q"
    assert seen[f"{layer}.mlp.up_proj.base_layer.weight"] == "mlp.up"
    assert seen[f"{layer}.mlp.up_proj.lora_magnitude_vector.default.weight"] == "mlp.up"
    assert seen[f"{layer}.input_layernorm.weight"] == "norm"
    assert seen["base_model.model.score.modules_to_save.default.weight"] == "head"
    assert "" not in seen.values()


@pytest.mark.parametrize("model_type", families.find("llama").model_types)
def test_every_model_type_of_the_family_has_its_names(model_type: str) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    shape = CONFIG_MAPPING[model_type](
        num_hidden_layers=1, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    family = families.find(model_type)
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert roles.resolve(model, family, ["all"]) == linear
    for role in family.roles:
        assert roles.resolve(model, family, [role]), role


def test_unknown_family() -> None:
    with pytest.raises(UserError, match="did you mean: llama"):
        families.find("lama")
