"""The losses of domain adaptation against values by hand and by numpy, and their gradients against differences."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.special import log_softmax, softmax
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics import log_loss
from torch.autograd import gradcheck

from finetune import adaptation_losses as losses


def drawn(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def features():
    return drawn(7, 5), drawn(6, 5, seed=1) + 0.7


@pytest.fixture
def logits():
    return drawn(8, 4, seed=2, scale=2.0)


def discrepancy(a, b, mean):
    def kernel(x, y):
        return sum(np.exp(-cdist(x, y, "sqeuclidean") / (2 * width * mean)) for width in (1 / 8, 1 / 4, 1 / 2, 1, 2)).mean()

    return kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)


# -- the reversed gradient ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("progress", "strength"), [(0.0, 0.0), (0.5, math.tanh(2.5)), (1.0, math.tanh(5.0))])
def test_strength_of_the_reversal(progress, strength):  # 2 / (1 + exp(-10 p)) - 1 = tanh(5 p)
    assert losses.reversal_strength(progress) == pytest.approx(strength, abs=1e-15)
    values = drawn(3, 2).requires_grad_()
    weights = drawn(3, 2, seed=5)
    passed = losses.reverse_gradient(values, losses.reversal_strength(progress))
    assert torch.equal(passed, values)
    (passed * weights).sum().backward()
    np.testing.assert_allclose(values.grad.numpy(), -strength * weights.numpy(), atol=1e-15)


# -- values -------------------------------------------------------------------------------------------------------------------


def test_entropy_is_that_of_scipy(logits):
    np.testing.assert_allclose(losses.entropy(logits), scipy_entropy(softmax(logits.numpy(), 1), axis=1), rtol=1e-12)


def test_domain_loss_is_the_log_loss_of_each_domain():
    source, target = drawn(5, seed=3), drawn(9, seed=4)
    both = [log_loss([side] * len(x), 1 / (1 + np.exp(-x.numpy())), labels=[0, 1]) for side, x in ((1, source), (0, target))]
    assert losses.domain_loss(source, target).item() == pytest.approx(sum(both) / 2, rel=1e-12)
    weights = drawn(5, seed=6).abs(), drawn(9, seed=7).abs()
    both = [
        log_loss([side] * len(x), 1 / (1 + np.exp(-x.numpy())), labels=[0, 1], sample_weight=w.numpy())
        for side, x, w in ((1, source, weights[0]), (0, target, weights[1]))
    ]
    assert losses.domain_loss(source, target, *weights).item() == pytest.approx(sum(both) / 2, rel=1e-12)


def test_a_sure_discriminator_still_has_a_gradient():
    """A sigmoid before the logarithm has none: it is 1 to the last digit."""
    wrong = torch.full((2,), -60.0, requires_grad=True)
    losses.domain_loss(wrong, wrong.detach()).backward()
    np.testing.assert_allclose(wrong.grad.numpy(), [-0.25, -0.25])


def test_coral_is_the_distance_of_covariances(features):
    source, target = (x.numpy() for x in features)
    expected = np.linalg.norm(np.cov(source.T) - np.cov(target.T), "fro") ** 2 / (4 * 5**2)
    assert losses.coral(*features).item() == pytest.approx(expected, rel=1e-12)
    assert losses.coral(features[0], features[0] + 3).item() == pytest.approx(0, abs=1e-15)  # blind to the mean


def test_mk_mmd_by_pairs(features):
    source, target = (x.numpy() for x in features)
    mean = cdist(np.vstack([source, target]), np.vstack([source, target]), "sqeuclidean").mean()

    expected = discrepancy(source, target, mean)
    assert losses.mk_mmd(*features).item() == pytest.approx(expected, rel=1e-10)


def test_mk_mmd_of_large_and_of_equal_features():
    source = 100 * drawn(6, 4).float()
    assert 0 <= losses.mk_mmd(source, source.clone()).item() < 1e-5
    same = torch.ones(4, 3, requires_grad=True)
    losses.mk_mmd(same, same.detach()).backward()
    assert not same.grad.any()  # and no NaN


def test_mcc_by_loops(logits):
    shares = softmax(logits.numpy() / 2.5, 1)
    weights = 1 + np.exp([sum(p * np.log(p) for p in row) for row in shares])
    weights = len(shares) * weights / weights.sum()
    confusion = np.zeros((4, 4))
    for weight, row in zip(weights, shares, strict=True):
        for i in range(4):
            for j in range(4):
                confusion[i, j] += weight * row[i] * row[j]
    confusion /= confusion.sum(1, keepdims=True)
    expected = sum(confusion[i, j] for i in range(4) for j in range(4) if i != j) / 4
    assert losses.mcc(logits).item() == pytest.approx(expected, rel=1e-12)


def test_bnm_and_infomax_by_hand(logits):
    shares = softmax(logits.numpy(), 1)
    assert losses.bnm(logits).item() == pytest.approx(-np.linalg.norm(shares, "nuc") / 8, rel=1e-12)
    expected = scipy_entropy(shares, axis=1).mean() - scipy_entropy(shares.mean(0))
    assert losses.infomax(logits).item() == pytest.approx(expected, rel=1e-12)
    each = 40 * torch.eye(3, dtype=torch.float64)  # every class once, and quite sure
    assert losses.infomax(each).item() == pytest.approx(-math.log(3), rel=1e-9)
    assert losses.bnm(each).item() == pytest.approx(-1, rel=1e-9)


def test_the_outer_product_holds_every_class_with_every_feature():
    features, shares = torch.tensor([[2.0, 3.0]]), torch.tensor([[0.1, 0.4, 0.5]])
    np.testing.assert_allclose(losses.outer_product(features, shares).numpy(), [[0.2, 0.3, 0.8, 1.2, 1.0, 1.5]], rtol=1e-6)


def test_weights_follow_certainty(logits):
    logs = log_softmax(logits.numpy(), 1)
    np.testing.assert_allclose(losses.certainty_weight(logits), 1 + np.exp((np.exp(logs) * logs).sum(1)), rtol=1e-12)
    assert not losses.certainty_weight(logits.requires_grad_()).requires_grad


# -- gradients ----------------------------------------------------------------------------------------------------------------

ON_FEATURES = {"coral": losses.coral}
ON_LOGITS = {
    "entropy": losses.entropy,
    "bnm": losses.bnm,
    "infomax": losses.infomax,
}


@pytest.mark.parametrize("name", ON_FEATURES)
def test_gradients_on_features(name, features):
    assert gradcheck(ON_FEATURES[name], [x.requires_grad_() for x in features])


@pytest.mark.parametrize("name", ON_LOGITS)
def test_gradients_on_logits(name, logits):
    assert gradcheck(ON_LOGITS[name], logits.requires_grad_())


def test_gradient_of_the_domain_loss():
    inputs = [drawn(5, seed=3).requires_grad_(), drawn(4, seed=4).requires_grad_()]
    assert gradcheck(losses.domain_loss, inputs)


def test_gradient_of_mcc_with_its_weights_held(logits, monkeypatch):
    """The weights carry no gradient on purpose, so differences must be taken with them held."""
    held = losses.certainty_weight(logits / 2.5)
    monkeypatch.setattr(losses, "certainty_weight", lambda _: held)
    assert gradcheck(losses.mcc, logits.requires_grad_())


def test_gradient_of_mk_mmd_with_its_bandwidth_held(features):
    """The bandwidth is the mean squared distance without a gradient, so differences must be taken with it held."""
    source, target = (x.requires_grad_() for x in features)
    both = np.vstack([x.detach().numpy() for x in features])
    mean = cdist(both, both, "sqeuclidean").mean()
    given = torch.autograd.grad(losses.mk_mmd(source, target), source)[0].numpy()

    def value(flat):
        return discrepancy(flat.reshape(7, 5), target.detach().numpy(), mean)

    start, step = source.detach().numpy().ravel(), 1e-6
    differences = [(value(start + step * e) - value(start - step * e)) / (2 * step) for e in np.eye(len(start))]
    np.testing.assert_allclose(given.ravel(), differences, atol=1e-7)
