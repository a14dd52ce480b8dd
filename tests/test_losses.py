"""The losses against scikit-learn's weights, torchvision's focal loss, and values computed by hand."""

import math

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from finetune import ConfigError, FinetuneModule
from finetune.losses import class_weights, classification_loss, training_counts

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, -0.3], [-1.5, 3.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1, 2])


def test_balanced_weights_are_those_of_scikit_learn():
    labels = [0] * 40 + [1] * 10 + [2] * 2
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert class_weights("balanced", [40, 10, 2]).numpy() == pytest.approx(expected, rel=1e-6)
    assert class_weights("none", [40, 10]) is None


def test_effective_weights_by_hand():
    counts = [2000, 100]
    raw = [0.001 / (1 - 0.999**n) for n in counts]
    scale = sum(counts) / sum(w * n for w, n in zip(raw, counts, strict=True))
    weights = class_weights("effective", counts)
    assert weights.numpy() == pytest.approx([w * scale for w in raw], rel=1e-5)
    assert weights[1] / weights[0] < 20  # milder than balanced


def test_a_class_without_pictures_weighs_nothing():
    assert class_weights("balanced", [5, 0, 5]).tolist() == [1.0, 0.0, 1.0]


def test_cross_entropy_is_that_of_torch_for_labels_and_distributions():
    assert classification_loss(LOGITS, LABELS, smoothing=0.1).item() == pytest.approx(
        F.cross_entropy(LOGITS, LABELS, label_smoothing=0.1).item()
    )
    soft = F.one_hot(LABELS, 3).double()
    assert classification_loss(LOGITS, soft).item() == pytest.approx(F.cross_entropy(LOGITS, LABELS).item())


def test_weighted_loss_is_divided_by_pictures():
    weight = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
    each = F.cross_entropy(LOGITS, LABELS, reduction="none")
    expected = (each * weight[LABELS]).sum() / 4
    assert classification_loss(LOGITS, LABELS, weight=weight).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0, 2.0])
def test_focal_loss_of_a_sure_answer_has_a_finite_gradient(gamma):
    for label in (0, 1):
        logits = torch.tensor([[20.0, 0.0, 0.0]], requires_grad=True)
        classification_loss(logits, torch.tensor([label]), focal_gamma=gamma).backward()
        assert logits.grad.isfinite().all()


def test_focal_loss_by_hand_and_against_torchvision():
    p = LOGITS.softmax(1)[torch.arange(4), LABELS]
    expected = sum((1 - q) ** 2 * -math.log(q) for q in p.tolist()) / 4
    assert classification_loss(LOGITS, LABELS, focal_gamma=2.0).item() == pytest.approx(expected)
    # two classes whose logits differ by x are a sigmoid of x
    x = torch.tensor([0.3, -2.0, 4.0], dtype=torch.float64)
    y = torch.tensor([1, 0, 1])
    pair = torch.stack([torch.zeros_like(x), x], 1)
    theirs = sigmoid_focal_loss(x, y.double(), alpha=-1, gamma=1.5, reduction="mean")
    assert classification_loss(pair, y, focal_gamma=1.5).item() == pytest.approx(theirs.item())


def test_focal_loss_of_a_smoothed_label_is_that_of_its_distribution():
    soft = F.one_hot(LABELS, 3).double() * 0.9 + 0.1 / 3
    smoothed = classification_loss(LOGITS, LABELS, focal_gamma=2.0, smoothing=0.1)
    assert smoothed.item() == pytest.approx(classification_loss(LOGITS, soft, focal_gamma=2.0).item())


def test_counts_come_from_the_training_labels():
    class Data:
        def labels(self, split):
            return {"train": [0, 0, 2]}[split]

    assert training_counts(Data(), 4) == [2, 0, 1, 0]
    with pytest.raises(ConfigError, match="has no method labels"):
        training_counts(object(), 4)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"class_weights": "balancd"}, "Did you mean 'balanced'"),
        ({"focal_gamma": -1}, "focal_gamma to be 0 or more"),
        ({"mix_share": 0}, "mix_share to be above 0"),
        ({"lr_rule": "cubic"}, "Expected none, linear, sqrt"),
    ],
)
def test_options_out_of_range(option, message):
    with pytest.raises(ConfigError, match=message):
        FinetuneModule("test_resnet", num_classes=3, weights="none", **option)
