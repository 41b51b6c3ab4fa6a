"""Launch presets, a user's own Accelerate file, and what a strategy needs, said before a process is started."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from peftcli.config.compose import compose
from peftcli.config.errors import UserError
from peftcli.launch import strategy
from tests.commands import assert_said

PRESETS = ("single", "ddp", "fsdp", "cpu", "deepspeed-zero2", "deepspeed-zero3")
WRITTEN = {  # by `accelerate config` for two processes with FSDP 2
    "compute_environment": "LOCAL_MACHINE",
    "debug": False,
    "distributed_type": "FSDP",
    "downcast_bf16": "no",
    "enable_cpu_affinity": False,
    "fsdp_config": {
        "fsdp_activation_checkpointing": False,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_cpu_ram_efficient_loading": False,
        "fsdp_offload_params": True,
        "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_version": 2,
    },
    "machine_rank": 0,
    "main_training_function": "main",
    "mixed_precision": "bf16",
    "num_machines": 1,
    "num_processes": 2,
    "rdzv_backend": "static",
    "same_network": True,
    "tpu_env": [],
    "tpu_use_cluster": False,
    "tpu_use_sudo": False,
    "use_cpu": False,
}


@pytest.fixture
def file(tmp_path: Path):
    """`file(key=value)` is Accelerate's file with changes, None takes a key away."""

    def write(**changes) -> Path:
        path = tmp_path / "accelerate.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in (WRITTEN | changes).items() if v is not None}))
        return path

    return write


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_compose(preset) -> None:
    launch = compose("quickstart", [f"launch={preset}"]).config.launch
    assert (launch.strategy == "ddp") == (preset in ("single", "ddp", "cpu"))
    assert launch.processes == (1 if preset in ("single", "cpu") else 2)
    assert compose("quickstart", [f"launch={preset}", "launch.processes=4"]).config.launch.processes == 4


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["launch.strategy=fsdp"], "there is one"),
        (["launch.offload=true", "launch.processes=2"], "there are no parts"),
        (["launch=fsdp", "model.quantization=int8"], "few bits are not cut up"),
        (["launch=deepspeed-zero3", "launch.device=cpu"], "DeepSpeed is for GPUs"),
        (["launch=fsdp", "method=full", "training.precision=fp16"], "gradients in parts"),
    ],
)
def test_what_does_not_go_together(given, said) -> None:
    with pytest.raises(UserError, match=said):
        compose("quickstart", given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["launch=deepspeed-zero2"], "pip install 'peftcli"),
        (["launch=fsdp", "method=kpsvd"], "method.base=delta"),
        (["launch=fsdp", "method.init=pissa", "method.dropout=0"], "method.init=default"),
    ],
)
def test_what_a_strategy_cannot_have_is_said_first(given, said) -> None:
    with pytest.raises(UserError, match=said):
        strategy.check(compose("quickstart", ["method=lora", *given]).config)


def test_an_accelerate_file_overrules_the_recipe_and_the_command_line_overrules_it(file) -> None:
    composed = compose("quickstart", [f"launch.accelerate={file()}", "launch.processes=3", "training.precision=fp32"])
    launch = composed.config.launch
    assert (launch.strategy, launch.offload, launch.processes, launch.device) == ("fsdp", True, 3, "auto")
    assert composed.config.training.precision == "fp32"
    assert composed.origins["launch.offload"] == str(file())
    assert compose("quickstart", [f"launch.accelerate={file()}"]).config.training.precision == "bf16"


def test_an_accelerate_file_for_cpus(file) -> None:
    path = file(distributed_type="MULTI_CPU", fsdp_config=None, use_cpu=True, mixed_precision=False)
    composed = compose("quickstart", [f"launch.accelerate={path}"])
    assert (composed.config.launch.device, composed.config.training.precision) == ("cpu", "fp32")
    alone = file(distributed_type="NO", fsdp_config=None)
    assert compose("quickstart", [f"launch.accelerate={alone}"]).config.launch.processes == 1


def test_what_an_accelerate_file_says_in_vain_is_named(file) -> None:
    path = file(num_machines=2, tpu_use_cluster=True, dynamo_config={"dynamo_backend": "INDUCTOR"})
    with pytest.raises(UserError) as refused:
        compose("quickstart", [f"launch.accelerate={path}"])
    said = [mistake.what for mistake in refused.value.mistakes]
    assert len(said) == 3
    for named in ("num_machines: 2", "tpu_use_cluster: True", "dynamo_config.dynamo_backend: INDUCTOR"):
        assert any(named in one for one in said)
    with pytest.raises(UserError, match="cannot be read"):
        compose("quickstart", ["launch.accelerate=gone.yaml"])


def test_the_command_line_says_it_too(peft) -> None:
    assert_said(peft("train", "quickstart", "launch=fsdp", "method=kpsvd"), 2, "launch.strategy=fsdp: method.base=residual")
