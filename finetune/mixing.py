"""Mixup and CutMix: training pictures and their labels are mixed in pairs."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import v2


class Mixing:
    """Mix the pictures of a batch by torchvision's MixUp (Zhang et al. 2018) and CutMix (Yun et al. 2019).

    What is drawn follows torch's generator, which the module seeds in every step.

    Args:
        mixup: Parameter of the Beta distribution that mixup's shares are drawn from; 0 for no mixup.
        cutmix: The same for CutMix. If both are given, a coin decides in each step.
        num_classes: Number of classes.
        share: Share of the run, from its start, in which pictures are mixed: the last epochs see them as they are.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int, share: float) -> None:
        self.share = share
        self.ways: list[v2.Transform] = []
        if mixup:
            self.ways.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
        if cutmix:
            self.ways.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))

    def applies(self, epoch: int, epochs: int) -> bool:
        """Say whether pictures are mixed in an epoch, counted from 0.

        >>> [Mixing(0.2, 0, 10, 0.9).applies(epoch, 5) for epoch in range(5)]
        [True, True, True, True, False]
        >>> Mixing(0.2, 0, 10, 0.9).applies(0, 1)  # a run of one epoch has no last one to leave out
        True
        """
        off = 0 if self.share >= 1 else min(max(1, round((1 - self.share) * epochs)), max(0, epochs - 1))
        return bool(self.ways) and epoch < epochs - off

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Mixing is linear, so doing it before the normalisation is the same as behind it; but not among rounded numbers.

        Args:
            images: (N, 3, H, W), uint8 or float in [0, 1].
            labels: Class indices (N,).

        Returns:
            Pictures as float in [0, 1], and a distribution over the classes for each, (N, K).
        """
        way = self.ways[int(torch.randint(len(self.ways), ()))] if len(self.ways) > 1 else self.ways[0]
        floats = images.float().div_(255) if images.dtype == torch.uint8 else images
        mixed, targets = way(floats, labels)
        return mixed, targets
