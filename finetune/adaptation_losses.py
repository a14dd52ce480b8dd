"""The arithmetic of domain adaptation: pure functions of features (N, C) and logits (N, K), each with its source.

Logits go in, never probabilities: their logarithms are exact where a probability rounds to 0 or 1.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

KERNELS = tuple(2.0**power for power in range(-3, 2))
"""Widths of the kernels of `mk_mmd`, as multiples of the mean squared distance (Long et al. 2015)."""


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradient, None


def reverse_gradient(values: Tensor, strength: float) -> Tensor:
    """Return the values as they are; on the way back, their gradient is multiplied by -strength (Ganin & Lempitsky 2015)."""
    return cast(Tensor, _Reverse.apply(values, strength))


def reversal_strength(progress: float, steepness: float = 10.0) -> float:
    """Return the strength of the reversed gradient, rising from 0 to almost 1 (Ganin et al. 2016).

    Args:
        progress: Share of the run that is done.
        steepness: How early it rises.

    >>> [round(reversal_strength(p), 4) for p in (0.0, 0.1, 0.5, 1.0)]
    [0.0, 0.4621, 0.9866, 0.9999]
    """
    return 2 / (1 + math.exp(-steepness * progress)) - 1


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy in nats of each row's class probabilities, (N,)."""
    logs = logits.log_softmax(1)
    return -(logs.exp() * logs).sum(1)


def domain_loss(
    source: Tensor, target: Tensor, source_weight: Tensor | None = None, target_weight: Tensor | None = None
) -> Tensor:
    """Return the cross-entropy of telling source (1) from target (0), the mean of both domains, each of which counts half.

    Args:
        source: Logits of a discriminator, (N,).
        target: Logits of a discriminator, (M,).
        source_weight: What each counts within its domain, (N,); all the same if None.
        target_weight: The same, (M,).
    """
    losses = []
    for logits, sign, weight in ((source, -1, source_weight), (target, 1, target_weight)):
        each = F.softplus(sign * logits)
        losses.append(each.mean() if weight is None else (weight * each).sum() / weight.sum())
    return (losses[0] + losses[1]) / 2


def certainty_weight(logits: Tensor) -> Tensor:
    """Return 1 + exp(-entropy) of each row, without a gradient: sure predictions count more (Long et al. 2018, CDAN+E)."""
    return 1 + torch.exp(-entropy(logits.detach()))


def outer_product(features: Tensor, probabilities: Tensor) -> Tensor:
    """Return each row's products of every class probability with every feature, (N, K * C) (Long et al. 2018, CDAN)."""
    return (probabilities.unsqueeze(2) * features.unsqueeze(1)).flatten(1)


def coral(source: Tensor, target: Tensor) -> Tensor:
    """Return the squared distance of two covariance matrices, over 4 C² (Sun & Saenko 2016).

    Args:
        source: Features, (N, C), with N at least 2.
        target: Features, (M, C), with M at least 2.
    """
    difference = source.T.cov() - target.T.cov()
    return difference.square().sum() / (4 * source.shape[1] ** 2)


def mk_mmd(source: Tensor, target: Tensor, kernels: tuple[float, ...] = KERNELS) -> Tensor:
    """Return the squared maximum mean discrepancy with a sum of Gaussian kernels, over all pairs (Long et al. 2015).

    The linear-time estimate that some use is noise at usual batch sizes. This one never falls below 0, yet even of equal
    distributions it is above it.

    Args:
        source: Features, (N, C).
        target: Features, (M, C).
        kernels: Widths as multiples of the mean squared distance, which is taken as a constant.
    """
    both = torch.cat([source, target])
    squares = both.square().sum(1)
    distance = (squares[:, None] + squares[None] - 2 * both @ both.T).clamp_min(0)  # rounding takes it below 0
    mean = distance.detach().mean().clamp_min(torch.finfo(distance.dtype).tiny)
    similar = torch.stack([torch.exp(-distance / (2 * width * mean)) for width in kernels]).sum(0)
    n = len(source)
    return similar[:n, :n].mean() + similar[n:, n:].mean() - 2 * similar[:n, n:].mean()


def mcc(logits: Tensor, temperature: float = 2.5) -> Tensor:
    """Return how much classes are confused on average: minimum class confusion (Jin et al. 2020).

    Args:
        logits: Of the target, (N, K).
        temperature: What they are divided by.
    """
    warm = logits / temperature
    shares = warm.softmax(1)
    weight = certainty_weight(warm)
    weight = len(logits) * weight / weight.sum()
    together = shares.T @ (weight[:, None] * shares)
    together = together / together.sum(1, keepdim=True).clamp_min(torch.finfo(together.dtype).tiny)  # a class without a share
    return (together.sum() - together.trace()) / logits.shape[1]


def bnm(logits: Tensor) -> Tensor:
    """Return minus the nuclear norm of the class probabilities, over N: sure and diverse is less (Cui et al. 2020)."""
    if not logits.isfinite().all():
        return logits.sum() * math.nan  # which a decomposition would not take
    values: Tensor = torch.linalg.svdvals(logits.softmax(1))
    return -values.sum() / len(logits)


def infomax(logits: Tensor) -> Tensor:
    """Return the mean entropy minus the entropy of the mean: sure and diverse is less (Krause et al. 2010)."""
    mean = logits.log_softmax(1).logsumexp(0) - math.log(len(logits))
    return entropy(logits).mean() + (mean.exp() * mean).sum()
