"""The plug-in as an outside package meets it: it costs nothing, hands out rows, and catches methods that lie."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest_plugins = ["pytester"]

LYING = """
import torch
from torch import nn
from peftcli.config import catalog
from peftcli.methods import contract, registry
from peftcli.methods.contract import Capabilities
from peftcli.methods.lora import tuner
from peftcli.testing.contract import MethodContract
from peftcli.testing.rows import Row


class Dead(tuner.Method):
    def attach(self, model, family, calibration=None):
        wrapped = super().attach(model, family)
        wrapped.unused = nn.Parameter(torch.zeros(3))
        return wrapped


class Noisy(tuner.Method):
    def attach(self, model, family, calibration=None):
        wrapped = super().attach(model, family)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
        return wrapped


class Modest(tuner.Method):
    capabilities = Capabilities(merges=False)


ROWS = {"dead": Dead, "noisy": Noisy, "modest": Modest}
found = registry.find
registry.find = lambda name: ROWS.get(name) or found(name)
settings_class = catalog.settings_class
catalog.settings_class = lambda name: settings_class("lora" if name in ROWS else name)


class TestLiars(MethodContract):
    rows = [Row(name) for name in ROWS]
"""


def test_a_pytest_run_without_rows_imports_no_torch() -> None:
    code = (
        "import sys, peftcli.testing.plugin; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_methods_that_promise_too_much_or_too_little_are_caught(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(LYING)
    result = pytester.runpytest_inprocess("-q", "-p", "no:cacheprovider")
    failed = {line.split("::")[-1].split(" ")[0] for line in result.outlines if line.startswith("FAILED")}
    assert "test_every_trained_tensor_gets_a_gradient[dead]" in failed
    assert "test_starts_as_the_base[noisy]" in failed
    assert "test_does_not_do_what_it_does_not_promise[modest]" in failed
    assert {name.split("[")[1] for name in failed} == {"dead]", "noisy]", "modest]"}
    assert not any("noisy" in name and "starts_as_the_base" not in name for name in failed)
    assert not any("modest" in name and "does_not_promise" not in name for name in failed)
