"""A user's own Accelerate configuration file, as overrides of a recipe; what cannot be honoured is named.

Accelerate's keys are those that `accelerate config` writes (accelerate.commands.config.config_args).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from peftcli.config.errors import Mistake, UserError

STRATEGIES = {"NO": "ddp", "MULTI_CPU": "ddp", "MULTI_GPU": "ddp", "FSDP": "fsdp"}
PRECISIONS = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}
NOTHING: dict[str, tuple[Any, ...]] = {
    "compute_environment": ("LOCAL_MACHINE",),
    "debug": (False,),
    "downcast_bf16": ("no",),
    "dynamo_config": ({},),
    "enable_cpu_affinity": (False,),
    "gpu_ids": ("all", None),
    "ipex_config": ({},),
    "machine_rank": (0,),
    "main_process_ip": (None,),
    "main_process_port": (None, 0, 29500),
    "main_training_function": ("main",),
    "mpirun_config": ({},),
    "num_machines": (1,),
    "rdzv_backend": ("static", "c10d"),
    "same_network": (True,),
    "tpu_env": ([],),
    "tpu_use_cluster": (False,),
    "tpu_use_sudo": (False,),
    "fsdp_config.fsdp_activation_checkpointing": (False,),
    "fsdp_config.fsdp_auto_wrap_policy": ("TRANSFORMER_BASED_WRAP",),
    "fsdp_config.fsdp_backward_prefetch": ("BACKWARD_PRE",),
    "fsdp_config.fsdp_backward_prefetch_policy": ("BACKWARD_PRE",),
    "fsdp_config.fsdp_cpu_ram_efficient_loading": (False,),
    "fsdp_config.fsdp_forward_prefetch": (False,),
    "fsdp_config.fsdp_reshard_after_forward": (True,),
    "fsdp_config.fsdp_sharding_strategy": ("FULL_SHARD", 1),
    "fsdp_config.fsdp_state_dict_type": ("SHARDED_STATE_DICT", "FULL_STATE_DICT"),
    "fsdp_config.fsdp_sync_module_states": (True, False),
    "fsdp_config.fsdp_use_orig_params": (True,),
    "fsdp_config.fsdp_version": (2,),
    "deepspeed_config.gradient_accumulation_steps": (1, "auto"),
    "deepspeed_config.gradient_clipping": ("auto",),
    "deepspeed_config.zero3_init_flag": (False,),
    "deepspeed_config.zero3_save_16bit_model": (False, True),
}
"""Keys with the values that change nothing here, because it is done so anyway."""
HINTS = {
    "num_machines": "several machines: launch=slurm",
    "machine_rank": "several machines: launch=slurm",
    "gpu_ids": "choose GPUs with CUDA_VISIBLE_DEVICES",
    "fsdp_config.fsdp_activation_checkpointing": "training.gradient_checkpointing=true",
    "fsdp_config.fsdp_version": "it is FSDP 2 here, torch's fully_shard",
    "deepspeed_config.gradient_accumulation_steps": "training.micro_batch_size",
    "deepspeed_config.gradient_clipping": "optim.clip_norm",
}


def overrides(file: str) -> list[str]:
    """What the file says, as overrides of a recipe.

    Raises:
        UserError: There is no such file, or it says things that cannot be honoured; all of them by name.
    """
    path = Path(file).expanduser()
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(Mistake(f"launch.accelerate={file} cannot be read: {str(error).splitlines()[0]}")) from error
    if not isinstance(tree, dict):
        raise UserError(Mistake(f"launch.accelerate={file} is no configuration of Accelerate's"))
    found: dict[str, str] = {}
    mistakes = [_refused(file, key, value) for key, value in _flat(tree) if not _taken(key, value, found)]
    if mistakes:
        raise UserError(*mistakes)
    if str(tree.get("distributed_type")) == "NO":  # Accelerate itself starts one process then, whatever the number
        found["launch.processes"] = "1"
    return [f"{key}={value}" for key, value in found.items()]


def _flat(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from ((f"{key}.{inner}", part) for inner, part in value.items())
        else:
            yield str(key), value


def _taken(key: str, value: Any, found: dict[str, str]) -> bool:
    """Whether a value is honoured; what it means here goes to `found`."""
    if key == "distributed_type" and value in STRATEGIES:
        found["launch.strategy"] = STRATEGIES[value]
    elif key == "distributed_type" and value == "DEEPSPEED":
        found.setdefault("launch.strategy", "deepspeed-zero2")  # Accelerate's own default
    elif key == "deepspeed_config.zero_stage" and value in (2, 3):
        found["launch.strategy"] = f"deepspeed-zero{value}"
    elif key == "num_processes" and isinstance(value, int) and value > 0:
        found["launch.processes"] = str(value)
    elif key == "mixed_precision" and str(value).lower() in ("false", *PRECISIONS):  # YAML reads a bare no as false
        found["training.precision"] = PRECISIONS["no" if value is False else value]
    elif key == "use_cpu" and isinstance(value, bool):
        found |= {"launch.device": "cpu"} if value else {}
    elif key == "fsdp_config.fsdp_offload_params" and isinstance(value, bool):
        found["launch.offload"] = str(value).lower()
    elif key.startswith("deepspeed_config.offload_") and value in ("cpu", "none"):
        found |= {"launch.offload": "true"} if value == "cpu" else {}
    else:
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in NOTHING.get(key, ())) or (
            key == "downcast_bf16" and value is False
        )
    return True


def _refused(file: str, key: str, value: Any) -> Mistake:
    allowed = tuple(str(one) for one in NOTHING.get(key, ()))
    return Mistake(f"{key}: {value} in Accelerate's file is not honoured here", file, allowed, hint=HINTS.get(key, ""))
