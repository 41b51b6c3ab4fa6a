"""In bf16 on real weights every method that claims to start as the base does, up to rounding."""

from __future__ import annotations

import pytest

from peftcli.config.compose import compose
from peftcli.training import prepare

METHODS = {
    "lora": ["method=lora"],
    "DoRA": ["method=lora", "method.use_dora=true"],
    "PiSSA": ["method=lora", "method.init=pissa"],
    "OLoRA": ["method=lora", "method.init=olora"],
    "HRA": ["method=peft", "method.type=HRA", "method.args={r: 4}"],
    "full": ["method=full"],
}


@pytest.mark.samples
@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_start_is_the_base(name, tmp_path):
    rows = ["data.rows={train: 8, validation: 4, test: 4}", "training.precision=bf16", "fetch=false"]
    config = compose("smollm2/reuters-r8_lora", [*METHODS[name], *rows]).config
    prepare.use_cores(config.launch)
    accelerator = prepare.build_accelerator(config)
    material = prepare.load_material(config)
    feed, steps = prepare.build_feed(config, material, accelerator)
    loaded = prepare.load_model(config, material, accelerator)
    attached = prepare.attach(config, loaded, material, feed, steps, accelerator)
    passed = {row["name"]: row["detail"] for row in attached.checks}
    print(name, passed)
    assert {"identity-start", "dead-adapter"} <= set(passed)
