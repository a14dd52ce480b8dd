"""What one optimizer step does to each stage: its gradient, how far it moves, and how far it has come from where it started.

Everything is counted over the parameters of a stage that train. The norms of a measurement stay on the device until all are
known and are fetched together, so that a GPU is waited for once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from finetune.files import atomic_write


@dataclass(frozen=True)
class Flow:
    """What one optimizer step did to a stage; all None if the stage is frozen.

    Attributes:
        grad_norm: Euclidean norm of the gradient that backpropagation delivered: unscaled, and before clipping.
        weight_norm: Norm of the weights before the step.
        update_ratio: Norm of what the step changed, whatever the optimizer, over weight_norm; None if that is 0.
        distance: Norm of the difference between the weights before the step and those that training started from; None if
            these are not known any more.
        dead_share: Share of the gradient's values that are exactly 0.
        nonfinite: Number of the gradient's values that are NaN or infinite.
        rgn: Relative gradient norm, grad_norm over weight_norm, as Auto-RGN weighs layers (Lee et al. 2023, "Surgical
            Fine-Tuning Improves Adaptation to Distribution Shifts"); None if weight_norm is 0.
    """

    grad_norm: float | None = None
    weight_norm: float | None = None
    update_ratio: float | None = None
    distance: float | None = None
    dead_share: float | None = None
    nonfinite: int | None = None
    rgn: float | None = None

    @property
    def frozen(self) -> bool:
        """Whether the stage is frozen."""
        return self.grad_norm is None


class Measurement:
    """One measurement: begun when the gradients are there, finished when the optimizer has moved the weights.

    In between it holds a copy of the weights that train, at a time when the activations of the step are gone.

    Args:
        members: The parameters of each stage by name.
        start: The weights that training started from, by the same names, on any device; what it lacks has no distance.
        scale: What the gradients are multiplied by at this time (loss scaling of mixed precision).
    """

    def __init__(
        self, members: Mapping[str, Mapping[str, nn.Parameter]], start: Mapping[str, Tensor] | None = None, scale: float = 1.0
    ) -> None:
        self._scale = scale
        self._stages = {
            stage: [parameter for parameter in named.values() if parameter.requires_grad] for stage, named in members.items()
        }
        self._known: dict[str, list[Tensor]] = {}
        for stage, named in members.items():
            if self._stages[stage]:
                self._known[stage] = [*_of_gradients(self._stages[stage]), *_of_weights(named, start or {})]
        self._before = {stage: [parameter.detach().clone() for parameter in own] for stage, own in self._stages.items()}

    def finish(self) -> dict[str, Flow]:
        """Return what the step did, for each stage."""
        rows = [
            torch.stack([*known, _distance(self._stages[stage], self._before[stage])]) for stage, known in self._known.items()
        ]
        values = dict(zip(self._known, torch.stack(rows).tolist() if rows else [], strict=True))
        return {stage: self._flow(own, values[stage]) if own else Flow() for stage, own in self._stages.items()}

    def _flow(self, parameters: Sequence[nn.Parameter], values: Sequence[float]) -> Flow:
        gradient, alive, nonfinite, weight, distance, update = values
        gradient /= self._scale
        return Flow(
            grad_norm=gradient,
            weight_norm=weight,
            update_ratio=update / weight if weight else None,
            distance=None if distance < 0 else distance,
            dead_share=1 - alive / sum(parameter.numel() for parameter in parameters),
            nonfinite=int(nonfinite),
            rgn=gradient / weight if weight else None,
        )


def _of_gradients(parameters: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norm, how many values are not 0, and how many are not finite; a gradient that is missing counts as 0."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        nothing = parameters[0].new_zeros((), dtype=torch.float32)
        return nothing, nothing, nothing
    alive = torch.stack([torch.count_nonzero(gradient) for gradient in gradients]).sum()
    norm = _norm(gradients)
    if norm.device.type == "cpu" and norm.isfinite():  # a GPU counts faster than it answers
        return norm, alive.float(), torch.zeros_like(norm)
    nonfinite = torch.stack([torch.count_nonzero(~gradient.isfinite()) for gradient in gradients]).sum()
    return norm, alive.float(), nonfinite.float()


def _of_weights(named: Mapping[str, nn.Parameter], start: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the norm, and the distance from the start; -1 where the start is not known."""
    own = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    norm = _norm([parameter.detach() for parameter in own.values()])
    if not all(name in start and start[name].shape == parameter.shape for name, parameter in own.items()):
        return norm, norm.new_full((), -1.0)
    return norm, _distance(list(own.values()), [start[name] for name in own])


def _distance(parameters: Sequence[nn.Parameter], others: Sequence[Tensor]) -> Tensor:
    pairs = [(p.detach(), other.to(p.device, non_blocking=True)) for p, other in zip(parameters, others, strict=True)]
    return _norm([torch.dist(parameter.float(), other.float()) for parameter, other in pairs])


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return get_total_norm([tensor.float() for tensor in tensors])


def start_weights(parameters: Mapping[str, Tensor], file: Path | None, fresh: bool) -> dict[str, Tensor] | None:
    """Return the weights that training starts from, kept in a file where there is one to keep them in.

    They are read through the file's mapping into memory, so they take memory only while they are looked at, and a run that is
    resumed still has them.

    Args:
        parameters: The weights as they are now, by name.
        file: Where they are kept; in the main memory, and for this process only, if None.
        fresh: Whether training begins with them; a run that is resumed does not.

    Returns:
        The weights, or None if they are not known any more.
    """
    if not fresh:
        return load_file(file) if file is not None and file.is_file() else None
    copies = {name: parameter.detach().to("cpu", copy=file is None).contiguous() for name, parameter in parameters.items()}
    if file is None:
        return copies
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as partial:
        save_file(copies, partial)
    return load_file(file)


def finite(value: float | None) -> bool:
    """Say whether a value is there, and neither NaN nor infinite."""
    return value is not None and math.isfinite(value)
