"""Validators against numpy, and at their extremes."""

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from finetune.validators import neighbourhood_density, nuclear_norm, validators


def test_values_are_those_of_numpy():
    logits = 2 * torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = softmax(logits.numpy(), 1)
    found = {name: value.item() for name, value in validators(logits).items()}
    assert found["neg_entropy"] == pytest.approx(-entropy(shares, axis=1).mean(), rel=1e-12)
    assert found["infomax"] == pytest.approx(entropy(shares.mean(0)) - entropy(shares, axis=1).mean(), rel=1e-12)
    assert found["bnm"] == pytest.approx(np.linalg.norm(shares, "nuc") / math.sqrt(30 * 4), rel=1e-12)
    unit = shares / np.linalg.norm(shares, axis=1, keepdims=True)
    rows = [np.delete(unit @ unit[i], i) / 0.05 for i in range(30)]
    assert found["snd"] == pytest.approx(np.mean([entropy(softmax(row)) for row in rows]), rel=1e-9)


def test_all_reward_sure_and_diverse_predictions():
    sure = validators(40.0 * torch.eye(5).repeat(6, 1))
    unsure = validators(torch.zeros(30, 5))
    assert sure["infomax"].item() == pytest.approx(math.log(5))
    assert sure["neg_entropy"].item() == pytest.approx(0, abs=1e-9)
    assert sure["bnm"].item() == pytest.approx(1)
    assert all(sure[name] > unsure[name] for name in ("infomax", "neg_entropy", "bnm"))
    one_class = validators(torch.tensor([[40.0, 0, 0, 0, 0]]).repeat(30, 1))
    assert one_class["infomax"].item() == pytest.approx(0, abs=1e-9)  # which entropy alone takes for perfect
    assert one_class["neg_entropy"].item() == pytest.approx(0, abs=1e-9)


def test_density_of_many_pictures_is_that_of_some():
    logits = torch.randn(5000, 3, generator=torch.Generator().manual_seed(1))
    every = torch.linspace(0, 4999, 2000).round().long()
    assert neighbourhood_density(logits) == neighbourhood_density(logits[every])
    assert 0 < nuclear_norm(logits) < 1
