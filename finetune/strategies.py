"""How several processes keep their weights equal: the strategy that fits a freezing policy.

Stages that thaw during a run must be known to DistributedDataParallel from the start, and it must look for those without a
gradient in every step; without it they are never reduced, or training fails. A policy whose stages stay as they are needs no
such search.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy
from timm.layers import BatchNormAct2d
from torch import nn

from finetune import hardware
from finetune.errors import ConfigError

SEARCHING = "ddp_find_unused_parameters_true"


def choose_strategy(asked: Any, module: Any, processes: int) -> Any:
    """Return the strategy for the trainer.

    Args:
        asked: What the user says; `auto` leaves it to this function.
        module: The module; `has_unused_parameters` of it decides, where it has that.
        processes: Number of processes in all.
    """
    if asked != "auto" or processes <= 1:
        return asked
    return SEARCHING if getattr(module, "has_unused_parameters", False) else asked


def processes_of(config: dict[str, Any]) -> int:
    """Return how many processes a trainer's options ask for."""
    return hardware.device_count(config["devices"], str(config["accelerator"])) * int(config["num_nodes"])


def refuse_synchronised_batchnorm(trainer: L.Trainer, network: nn.Module) -> None:
    """Refuse `sync_batchnorm` where it would drop activations: torch puts a plain layer in the place of timm's, which has one.

    Raises:
        ConfigError: If the trainer would do so.
    """
    if getattr(trainer.strategy, "_layer_sync", None) is None:
        return
    if any(isinstance(layer, BatchNormAct2d) for layer in network.modules()):
        raise ConfigError(
            "trainer.sync_batchnorm would take the activations out of this backbone, whose BatchNorm layers hold them. Set "
            "sync_batchnorm to false; with model.bn frozen, all processes have the same statistics anyway."
        )


def require_searching(trainer: L.Trainer, why: str) -> None:
    """Refuse a strategy that would let the weights of the processes drift apart, or fail in the middle of the run.

    Args:
        trainer: The trainer.
        why: Why parameters may have no gradient.

    Raises:
        ConfigError: If there are several processes that do not look for parameters without a gradient.
    """
    if trainer.world_size <= 1:
        return
    strategy = trainer.strategy
    options: dict[str, Any] = strategy._ddp_kwargs if isinstance(strategy, DDPStrategy) else {}
    if options.get("find_unused_parameters") and not options.get("static_graph"):
        return
    found = type(strategy).__name__ + (" with static_graph" if options.get("static_graph") else "")
    raise ConfigError(
        f"{why}: several processes must look for parameters without a gradient, or their weights drift apart. Expected "
        f"Trainer(strategy='{SEARCHING}'), found {found} that does not look."
    )
