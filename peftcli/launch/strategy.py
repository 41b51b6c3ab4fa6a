"""What a launch strategy needs, said before any process is started."""

from __future__ import annotations

from importlib.util import find_spec

from peftcli.config.errors import Mistake, UserError
from peftcli.config.schema import RunConfig


def check(config: RunConfig) -> None:
    """Refuse a strategy that cannot be had.

    Raises:
        UserError: The method needs all of its base in each process, or the strategy is one of DeepSpeed's.
    """
    strategy = config.launch.strategy
    if strategy.startswith("deepspeed"):
        installed = "" if find_spec("deepspeed") else " (not installed here)"
        what = f"launch.strategy={strategy} is not driven by this program: DeepSpeed{installed} takes optimiser, "
        what += "clipping and checkpoints into its own hands, where stages, masks and exact resuming are"
        hint = "launch=fsdp cuts weights, gradients and optimiser state up as ZeRO's stage 3 does"
        raise UserError(Mistake(what, "launch.strategy", hint=hint))
    if strategy == "fsdp":
        from peftcli.methods import registry
        from peftcli.training import sharding

        sharding.check(registry.find(config.method.name)(config.method), config.method.name)
