"""What a method of domain adaptation is: `build` makes the layers it needs, `loss` returns what it adds to the loss.

Those that come along are in `adaptation_methods`; they are also examples of how to write another.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from finetune.checkpoints import plain
from finetune.errors import ConfigError


@dataclass(frozen=True)
class DomainBatch:
    """What a method sees of a training step, in float32.

    Attributes:
        source_features: What the head sees of the source, (N, C).
        target_features: The same of the target, (M, C).
        source_logits: (N, K).
        target_logits: (M, K).
        labels: Of the source, (N,).
        progress: Share of the run that is done.
    """

    source_features: Tensor
    target_features: Tensor
    source_logits: Tensor
    target_logits: Tensor
    labels: Tensor
    progress: float


class Adaptation(nn.Module):
    """Base of all methods. Keep arguments as attributes of the same name: checkpoints store them, and build the method again.

    Attributes:
        uses_target: Whether pictures of the target are wanted in training; if not, the network never sees one there.
        restates_batchnorm: Whether BatchNorm statistics are those of the target wherever the model is measured or kept.
    """

    uses_target = True
    restates_batchnorm = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Keep the method's layers in float32 where the module is cast to half precision: all it computes is in float32."""

        def unless_half(value: Tensor) -> Tensor:
            made = fn(value)
            return value.to(made.device) if made.is_floating_point() and made.dtype.itemsize < 4 else made

        return super()._apply(unless_half, recurse)  # type: ignore[no-untyped-call]

    def build(self, feature_dim: int, num_classes: int) -> None:
        """Make the layers that the method trains, if it has any; they learn at the head's rate.

        Args:
            feature_dim: Width C of the features.
            num_classes: Number K of classes.
        """

    def loss(self, batch: DomainBatch) -> Tensor | Mapping[str, Tensor]:
        """Return what is added to the classification loss: a scalar, or a mapping with `loss` and what else is to be logged.

        Args:
            batch: Features and logits of both domains.
        """
        raise ConfigError(f"{type(self).__name__} needs a method loss(batch) that returns a scalar. Add one to it.")


def describe(adaptation: Adaptation) -> dict[str, Any]:
    """Return the class and the arguments of a method as plain values, from which `create` makes it again.

    Raises:
        ConfigError: If the method does not keep an argument as an attribute.
    """
    kind = type(adaptation)
    names = [name for name in inspect.signature(kind).parameters if name not in ("args", "kwargs")]
    lost = [name for name in names if not hasattr(adaptation, name)]
    if lost:
        raise ConfigError(
            f"{kind.__name__} takes the argument '{lost[0]}' but has no attribute of that name, so a checkpoint could not "
            f"store it: write self.{lost[0]} = {lost[0]} in its __init__."
        )
    arguments = {name: plain(getattr(adaptation, name)) for name in names}
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}
