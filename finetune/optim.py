"""Optimizer groups, one per stage and kind of weight decay, each with its real learning rate in it.

Every parameter is in exactly one group from the first step on, frozen or not: a stage that thaws later needs no new group, so
schedulers keep working and a resume needs no special code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from finetune.errors import ConfigError, did_you_mean
from finetune.stages import HEAD, require_stage


@dataclass(frozen=True)
class StageRates:
    """What a stage's learning rate and weight decay follow from.

    Attributes:
        lr: Learning rate of the head.
        lr_decay: Factor per stage from the head towards the stem.
        lr_scale: Factors of `lr` in place of `lr_decay`: one number for all stages before the head, or a mapping from stages.
        weight_decay: Weight decay of matrices and kernels; vectors (biases, normalisation) get none.
    """

    lr: float
    lr_decay: float = 1.0
    lr_scale: float | Mapping[str, float] | None = None
    weight_decay: float = 0.0

    def scales(self, stages: Sequence[str]) -> dict[str, float]:
        """Return the factor of each stage.

        Args:
            stages: Names of all stages in the order of the network, the head last.

        Raises:
            ConfigError: If `lr_scale` names an unknown stage, is negative, or contradicts `lr_decay`.

        >>> StageRates(lr=0.1, lr_decay=0.5).scales(["stem", "layer1", "head"])
        {'stem': 0.25, 'layer1': 0.5, 'head': 1.0}
        >>> StageRates(lr=0.1, lr_scale=0.1).scales(["stem", "layer1", "head"])
        {'stem': 0.1, 'layer1': 0.1, 'head': 1.0}
        """
        scales = {name: self.lr_decay**distance for distance, name in enumerate(reversed(stages))}
        explicit = self.lr_scale if isinstance(self.lr_scale, Mapping) else {}
        if isinstance(self.lr_scale, int | float):
            if self.lr_decay != 1:
                raise ConfigError(
                    f"lr_decay ({self.lr_decay}) and one lr_scale for all stages ({self.lr_scale}) exclude each other: give "
                    "one of them, or lr_scale as a mapping from stages."
                )
            explicit = {name: self.lr_scale for name in stages if name != HEAD}
        scales.update({require_stage(name, stages): float(scale) for name, scale in explicit.items()})
        negative = [name for name, scale in scales.items() if scale < 0]
        if negative:
            raise ConfigError(f"Expected lr_scale to be 0 or more, found {scales[negative[0]]} for '{negative[0]}'.")
        return {name: scales[name] for name in stages}


LearningRateRule = Literal["none", "linear", "sqrt"]


def lr_factor(rule: LearningRateRule, effective: int, meant: int) -> float:
    """Return the factor of the learning rate for an effective batch that is not the one the rate is meant for.

    Args:
        rule: `none`, `linear` (Goyal et al. 2017) or `sqrt` (Krizhevsky 2014).
        effective: Pictures per optimizer step on all devices together.
        meant: The same, where the learning rate was found.

    >>> lr_factor("linear", 256, 64), lr_factor("sqrt", 256, 64), lr_factor("none", 256, 64)
    (4.0, 2.0, 1.0)
    """
    ratio = effective / meant
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[rule]


def effective_batch(trainer: L.Trainer) -> int:
    """Return the pictures per optimizer step: batch size x devices x accumulated batches.

    Raises:
        ConfigError: If the data module does not tell its batch size.
    """
    size = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    if size is None:
        raise ConfigError(
            "model.lr_rule needs the batch size, but the data module has no attribute 'batch_size'. Add one to it, or set "
            "model.lr_rule none."
        )
    return int(size) * trainer.world_size * trainer.accumulate_grad_batches


_FUSED = ("sgd", "nesterov", "momentum", "adam", "adamw")  # timm's names of torch's own


def build_groups(
    parameters: Mapping[str, nn.Parameter], members: Mapping[str, Sequence[str]], stages: Sequence[str], rates: StageRates
) -> list[dict[str, Any]]:
    """Return one group per stage and kind of weight decay.

    Args:
        parameters: All parameters by name.
        members: The names of the parameters of each stage; a key that is no stage is treated like the head.
        stages: Names of all stages in the order of the network, the head last.
        rates: What the learning rates follow from.

    Returns:
        Groups with the keys params, lr, weight_decay, name (`layer4`, `layer4/no_decay`) and stage.
    """
    scales = rates.scales(stages)
    groups = []
    for stage, names in members.items():
        for decays in (True, False):
            chosen = [parameters[name] for name in names if (parameters[name].ndim > 1) == decays]
            if chosen:
                groups.append(
                    {
                        "params": chosen,
                        "lr": rates.lr * scales.get(stage, 1.0),
                        "weight_decay": rates.weight_decay if decays else 0.0,
                        "name": stage if decays else f"{stage}/no_decay",
                        "stage": stage,
                    }
                )
    return groups


def build_optimizer(
    name: str, groups: Sequence[dict[str, Any]], momentum: float, options: Mapping[str, Any] | None, fused: bool = True
) -> torch.optim.Optimizer:
    """Create an optimizer by its timm name on ready groups.

    Args:
        name: A timm name.
        groups: The groups, see `build_groups`.
        momentum: Momentum, where the optimizer has one.
        options: Further arguments of the optimizer.
        fused: Let torch's own optimizers update all parameters in one pass, which is several times faster.

    Raises:
        ConfigError: If the name is unknown, needs a package that is missing, or does not take the options.
    """
    known = list_optimizers()
    if name.lower() not in known:
        raise ConfigError(
            f"Unknown optimizer '{name}'.{did_you_mean(name, known)} Expected sgd, adamw or another timm optimizer."
        )
    options = {**({"fused": True} if fused and name.lower() in _FUSED else {}), **(options or {})}
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            list(groups), opt=name.lower(), lr=groups[0]["lr"], momentum=momentum, **options
        )
    except (ImportError, TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"The optimizer '{name}' could not be created with {options}: {error}") from error
    return optimizer


def scales_loss(trainer: L.Trainer) -> bool:
    """Return whether the loss is scaled, so that gradients are too large until somebody unscales them."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def let_gradients_be_clipped(trainer: L.Trainer) -> None:
    """Make sure that gradients are clipped at their true size, whatever optimizer the module has configured.

    Fused optimizers can unscale gradients within their step, behind the clipping. Lightning refuses to clip for them under any
    mixed precision; but where the loss is not scaled, as in bfloat16, there is nothing to unscale.

    Raises:
        ConfigError: If the loss is scaled and the optimizer would unscale too late.
    """
    for optimizer in trainer.optimizers:
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            continue
        if not scales_loss(trainer):
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # what Lightning asks
        elif trainer.gradient_clip_val:
            raise ConfigError(
                f"Under precision {trainer.precision} the loss is scaled, and a fused {type(optimizer).__name__} unscales the "
                "gradients only after they would be clipped. Leave out 'fused' from model.optimizer_args, leave out "
                "trainer.gradient_clip_val, or use precision bf16-mixed or 32-true."
            )
