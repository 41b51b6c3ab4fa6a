"""What a launch strategy needs of the method and of what is installed, said before any process is started."""

from __future__ import annotations

from importlib.util import find_spec

from peftcli.config.errors import Mistake, UserError
from peftcli.config.schema import RunConfig


def check(config: RunConfig) -> None:
    """Refuse a strategy that cannot be had.

    Raises:
        UserError: The method needs all of its base in each process, or a library is missing.
    """
    strategy = config.launch.strategy
    if strategy.startswith("deepspeed") and find_spec("deepspeed") is None:
        what = f"launch.strategy={strategy} needs DeepSpeed, which is not installed"
        hint = "pip install 'peftcli[deepspeed]' on a machine with GPUs, or launch=fsdp, which needs nothing more"
        raise UserError(Mistake(what, "launch.strategy", hint=hint))
    if strategy == "fsdp":
        from peftcli.methods import registry
        from peftcli.training import sharding

        sharding.check(registry.find(config.method.name)(config.method), config.method.name)
