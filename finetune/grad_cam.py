"""Where in an image the output of a stage speaks for a class: Grad-CAM, for maps and for tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.boundaries import Output
from finetune.errors import ConfigError
from finetune.staged import StagedModule
from finetune.stages import require_stage


class Explanation(NamedTuple):
    """What a model says of images, and where it looked, both from one forward pass.

    Attributes:
        maps: (N, H, W) between 0 (nothing speaks for the class) and 1 (the strongest place of the image).
        logits: (N, num_classes).
        stage: The stage whose output the maps are of.
    """

    maps: Tensor
    logits: Tensor
    stage: str


def grad_cam(module: StagedModule, images: Tensor, stage: str | None = None, labels: Tensor | None = None) -> Tensor:
    """Return the maps of `look`, (N, H, W)."""
    return look(module, images, stage, labels).maps


def look(module: StagedModule, images: Tensor, stage: str | None = None, labels: Tensor | None = None) -> Explanation:
    """Show where in images the output of a stage speaks for a class (Grad-CAM, Selvaraju et al. 2017).

    The channels of the stage's output are weighted with their mean gradient, summed, and kept where positive. The class token
    of a transformer is no place; where the class is read from it alone, no gradient reaches the patches of the last block, and
    the block before it is the last one that shows something.

    Args:
        module: The model, in eval mode.
        images: (N, 3, H, W), uint8, or float in [0, 1].
        stage: Its name; the last stage that shows places if None.
        labels: Number of the class for each image, (N,); the predicted one if None.

    Raises:
        ConfigError: If there is no such stage, or its output shows no places.
    """
    names = [each.name for each in module.stages]
    if stage is not None:
        require_stage(stage, names)
    outputs = {name: module.boundaries.outputs[name] for name in (names if stage is None else [stage])}
    if not any(output.layout.spatial for output in outputs.values()):
        raise ConfigError(_why_no_place(outputs, stage))
    outputs = {name: output for name, output in outputs.items() if output.layout.spatial}
    activations, logits = _forward(module, images, outputs)
    labels = logits.argmax(1) if labels is None else labels.to(logits.device)
    score = logits.gather(1, labels[:, None]).sum()
    gradients: Sequence[Tensor | None] = torch.autograd.grad(score, list(activations.values()), allow_unused=True)
    for (name, activation), gradient in reversed([*zip(activations.items(), gradients, strict=True)]):
        if gradient is None:
            continue
        maps, slopes = (outputs[name].layout.maps(each.detach(), *images.shape[-2:]) for each in (activation, gradient))
        if not slopes.any() and gradient.any():  # it all went to the class token
            continue
        return Explanation(class_map(maps, slopes, images.shape[-2:]), logits.detach(), name)
    raise ConfigError(_why_no_gradient(stage, names))


def class_map(activation: Tensor, gradient: Tensor, size: Sequence[int]) -> Tensor:
    """Weight channels with their mean gradient, sum them, keep what is positive, and lay it over the image.

    Args:
        activation: (N, C, h, w).
        gradient: That of a class by it, (N, C, h, w).
        size: Height and width of the images.

    Returns:
        (N, H, W) between 0 and 1.
    """
    speaks = (gradient.mean((2, 3), keepdim=True) * activation).sum(1, keepdim=True).relu()
    strongest = speaks.amax((1, 2, 3), keepdim=True)
    speaks = torch.where(strongest > 0, speaks / strongest, 0)
    return F.interpolate(speaks, tuple(size), mode="bilinear", align_corners=False)[:, 0]


def _forward(module: StagedModule, images: Tensor, outputs: dict[str, Output]) -> tuple[dict[str, Tensor], Tensor]:
    """Return the output of some stages, each ready to be differentiated by, and the logits."""
    found: dict[str, Tensor] = {}

    def keep(stage: str, tap: str, activation: Tensor) -> Tensor | None:
        if stage not in outputs or tap != outputs[stage].tap:
            return None
        found[stage] = activation if activation.requires_grad else activation.detach().requires_grad_()
        return found[stage].clone()  # the next layer may write into it

    with torch.enable_grad(), module.boundaries.tapping(keep):
        logits = module(images)
    return {name: found[name] for name in outputs}, logits


def _why_no_place(outputs: dict[str, Output], stage: str | None) -> str:
    reasons = [output.layout.unknown for output in outputs.values() if output.layout.unknown]
    if reasons:
        return reasons[-1] if stage is None else f"Stage '{stage}' cannot be explained. {reasons[-1]}"
    return f"The output of {stage or 'every stage'} has no height and width, so there is no place to point at."


def _why_no_gradient(stage: str | None, names: Sequence[str]) -> str:
    if stage is None:
        return "No gradient of the class reaches the places of any stage, so there is nothing to show."
    earlier = list(names)[: list(names).index(stage)]
    return (
        f"The output of {stage} has no height and width that the class depends on: it is read from the class token alone, so "
        f"there is no place to point at. Look at an earlier stage{f', such as --stage {earlier[-1]}' if earlier else ''}."
    )
