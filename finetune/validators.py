"""Numbers that say how well a model fits a target domain without its labels. More is better for all of them.

They choose between checkpoints of one run, and between runs; none of them is an accuracy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from finetune import adaptation_losses as losses

_MOST = 2000  # pictures whose neighbourhoods are compared, as the work grows with the square of their number


def validators(logits: Tensor) -> dict[str, Tensor]:
    """Return all validators of a target.

    Args:
        logits: (N, K).

    Returns:
        infomax, neg_entropy, bnm and snd, each a scalar.
    """
    logits = logits.double()
    return {
        "infomax": -losses.infomax(logits),
        "neg_entropy": -losses.entropy(logits).mean(),
        "bnm": nuclear_norm(logits),
        "snd": neighbourhood_density(logits),
    }


def nuclear_norm(logits: Tensor) -> Tensor:
    """Return the nuclear norm of the class probabilities as a share of what it can be at most (Cui et al. 2020).

    Args:
        logits: (N, K).
    """
    shares = logits.softmax(1)
    if not shares.isfinite().all():
        return shares.sum() * math.nan  # which a decomposition would not take
    squared: Tensor = torch.linalg.eigvalsh(shares.T @ shares).clamp_min(0)  # K x K, however many pictures there are
    return squared.sqrt().sum() / math.sqrt(len(logits) * min(logits.shape))


def neighbourhood_density(logits: Tensor, temperature: float = 0.05) -> Tensor:
    """Return the soft neighbourhood density (Saito et al. 2021): how evenly a picture is like the others it is like.

    It is the mean entropy of each picture's similarities to all others. Of more than 2,000 pictures as many are taken evenly.

    Args:
        logits: (N, K), with N at least 2.
        temperature: What cosines are divided by.
    """
    chosen = torch.linspace(0, len(logits) - 1, min(len(logits), _MOST), device=logits.device).round().long()
    unit = torch.nn.functional.normalize(logits[chosen].softmax(1))
    similar = unit @ unit.T / temperature
    others = ~torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    return losses.entropy(similar[others].view(len(unit), len(unit) - 1)).mean()
