"""The base's hash: the same in every wrapping and dtype, another for every other base."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_llama import adapted, run_config, tiny

from peftcli.artifacts import lineage
from peftcli.config import frozen

Q_AND_V = [f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1) for name in "qv"]


def hashed(model, names=Q_AND_V) -> str:
    return lineage.combined(lineage.digests(model, names))


def test_the_wrapped_and_the_untouched_base_have_the_same_tensors_and_hash():
    base = tiny()
    names, before = set(base.state_dict()), lineage.digests(base)
    model = adapted(base, modules_to_save=["lm_head"])
    assert set(lineage.base_tensors(model)) == names
    assert lineage.adapted(model) == Q_AND_V
    assert lineage.digests(model) == before


def test_the_hash_does_not_depend_on_dtype_or_layout_but_on_content_shape_and_name():
    assert hashed(tiny()) == hashed(tiny(dtype=torch.bfloat16))
    assert hashed(tiny()) == hashed(tiny(), reversed(Q_AND_V))
    turned, other = tiny(), tiny(seed=1)
    weight = turned.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.t().contiguous().t()
    assert hashed(turned) == hashed(tiny())
    assert hashed(other) != hashed(tiny())
    flat = tiny()
    flat.model.layers[0].self_attn.q_proj.weight.data = flat.model.layers[0].self_attn.q_proj.weight.data.flatten()
    assert hashed(flat) != hashed(tiny())
    assert hashed(tiny(), Q_AND_V[:3]) != hashed(tiny())


def test_a_method_that_rearranges_the_base_is_hashed_before_it_does():
    base = tiny()
    before = lineage.digests(base)
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")
    model = get_peft_model(base, settings)
    said = {"base_id": "tiny", "revision": None, "data_fingerprint": ""}
    naive = lineage.collect(model, run_config(), **said)
    right = lineage.collect(model, run_config(), **said, base=before)
    assert right["base"]["hash"] == hashed(tiny()) != naive["base"]["hash"]
    assert list(right["base"]["tensors"]) == Q_AND_V


def test_a_whole_trained_model_does_not_pass_for_its_base():
    said = {"base_id": "tiny", "revision": None, "data_fingerprint": ""}
    assert lineage.collect(tiny(), run_config(), **said)["base"]["hash"] is None
    known = lineage.collect(tiny(seed=1), run_config(), **said, base=lineage.digests(tiny()))
    assert known["base"]["hash"] == lineage.combined(lineage.digests(tiny()))


def test_the_config_hash_follows_the_experiment_and_not_its_place():
    here = lineage.config_hash(run_config("runs", name="a"))
    assert lineage.config_hash(run_config("elsewhere", name="b")) == here
    assert lineage.config_hash(run_config("runs", seed=1)) != here
    assert lineage.config_hash(frozen.anchored(run_config())) == here


@pytest.mark.parametrize("names", [["nothing.here"], []])
def test_a_tensor_that_the_base_lacks_differs_from_every_digest(names):
    assert lineage.digests(tiny(), names) == dict.fromkeys(names, "")
