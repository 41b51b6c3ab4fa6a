"""A tuner of our own works in plain PEFT once it is registered."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from tiny_llama import tiny
from torch import nn

import peftcli
from peftcli.config import catalog
from peftcli.config.errors import UserError
from peftcli.methods.peft_types import PeftName, PeftRow


@dataclass
class OffsetConfig(PeftConfig):
    target_modules: list[str] = field(default_factory=lambda: ["q_proj"])
    layers_to_transform: None = None
    modules_to_save: None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftName("TOYOFFSET")


class OffsetLayer(nn.Module, BaseTunerLayer):
    """Adds a trained vector to a linear layer's outputs."""

    adapter_layer_names = ("toyoffset_v",)

    def __init__(self, base_layer: nn.Linear, adapter_name: str):
        super().__init__()
        self.base_layer, self.merged_adapters = base_layer, []
        self.toyoffset_v = nn.ParameterDict({adapter_name: nn.Parameter(torch.zeros(base_layer.out_features))})

    def forward(self, x):
        found = self.base_layer(x)
        return found if self.disable_adapters else found + self.toyoffset_v[self.active_adapters[0]]


class OffsetModel(BaseTuner):
    prefix = "toyoffset_"
    tuner_layer_cls = OffsetLayer

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key, **_):
        self._replace_module(parent, target_name, OffsetLayer(target, adapter_name), target)


ROW = PeftRow("TOYOFFSET", OffsetConfig, OffsetModel)


@pytest.fixture
def registered(monkeypatch):
    """A package whose method brings its own tuner, beside our own methods."""
    monkeypatch.setitem(sys.modules, "toy.tuner", SimpleNamespace(PEFT_TYPE=ROW))
    everything = {**catalog.methods(), "toy": "toy"}
    monkeypatch.setattr(catalog, "methods", lambda: everything)
    peftcli.register_with_peft()
    peftcli.register_with_peft()
    yield
    for known in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        del known[ROW.name]


def test_a_strangers_script_loads_our_adapter(registered, tmp_path):
    model = get_peft_model(tiny(), OffsetConfig(task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("toyoffset_" in name)
        if parameter.requires_grad:
            parameter.data += 1
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "TOYOFFSET"
    ids = torch.arange(6)[None]
    again = PeftModel.from_pretrained(tiny(), str(tmp_path))
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    with again.disable_adapter():
        assert torch.equal(again(ids).logits, tiny().eval()(ids).logits)


def test_a_name_that_is_taken_is_refused(registered, monkeypatch):
    taken = PeftRow("LORA", OffsetConfig, OffsetModel)
    monkeypatch.setitem(sys.modules, "toy.tuner", SimpleNamespace(PEFT_TYPE=taken))
    with pytest.raises(UserError, match=r"adapter type 'LORA' of test_register is taken by peft\.tuners\.lora"):
        peftcli.register_with_peft()


def test_the_name_survives_what_peft_does_with_configs():
    name = PeftName("TOYOFFSET")
    assert (name.value, name.name, json.dumps(name)) == ("TOYOFFSET", "TOYOFFSET", '"TOYOFFSET"')
    assert copy.deepcopy(name).value == "TOYOFFSET"


def test_the_package_itself_is_light():
    code = "import peftcli, sys, json; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert not {"torch", "transformers", "peft", "hydra", "importlib.metadata"} & set(loaded)
