"""Metrics against scikit-learn, calibration against a case by hand, and intervals against a simulation of the truth."""

import math

import numpy as np
import pytest
from sklearn import metrics as reference

from finetune.outcomes import Outcome
from finetune.scores import calibration, confused_pairs, confusion, ece, metrics, per_class, selective, worst_mistakes


def drawn(number=300, classes=7, seed=0, absent=()):
    """Pictures whose classes are guessed better than chance; probabilities are rounded, so that there are ties."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([label for label in range(classes) if label not in absent], number)
    logits = rng.normal(size=(number, classes)) + 1.5 * np.eye(classes)[labels]
    probabilities = np.round(np.exp(logits) / np.exp(logits).sum(1, keepdims=True), 2) + 1e-3
    probabilities /= probabilities.sum(1, keepdims=True)
    names = tuple(f"class {label}" for label in range(classes))
    return Outcome([f"{index}.png" for index in range(number)], labels, probabilities, names)


@pytest.mark.parametrize("absent", [(), (2, 5)], ids=["all classes", "two never occur"])
def test_tables_are_those_of_scikit_learn(absent):
    outcome = drawn(absent=absent)
    numbers = list(range(7))
    table = reference.confusion_matrix(outcome.labels, outcome.predicted, labels=numbers)
    np.testing.assert_array_equal(confusion(outcome), table)
    columns = reference.precision_recall_fscore_support(outcome.labels, outcome.predicted, labels=numbers, zero_division=0)
    for name, expected in zip(("precision", "recall", "f1", "support"), columns, strict=True):
        np.testing.assert_allclose(per_class(outcome)[name], expected)


def test_metrics_are_those_of_scikit_learn():
    outcome = drawn()
    labels, predicted, probabilities = outcome.labels, outcome.predicted, outcome.probabilities
    truth = np.eye(7)[labels]
    expected = {
        "acc": reference.accuracy_score(labels, predicted),
        "acc_macro": reference.balanced_accuracy_score(labels, predicted),
        "f1": reference.f1_score(labels, predicted, average="macro"),
        "precision": reference.precision_score(labels, predicted, average="macro"),
        "acc_top5": reference.top_k_accuracy_score(labels, probabilities + 1e-9 * truth, k=5),  # a tie counts as found
        "auroc": reference.roc_auc_score(labels, probabilities, multi_class="ovr"),
        "nll": reference.log_loss(labels, probabilities),
        "brier": ((probabilities - truth) ** 2).sum(1).mean(),
    }
    found = metrics(outcome, resamples=0)
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value, abs=1e-12), name
    assert set(found) == {*expected, "ece"}
    assert all(math.isnan(interval.low) and math.isnan(interval.high) for interval in found.values())


def test_two_classes_and_a_class_that_is_missing():
    outcome = drawn(classes=2)
    found = metrics(outcome, resamples=0)
    assert "acc_top5" not in found
    expected = reference.roc_auc_score(outcome.labels, outcome.probabilities[:, 1])
    assert found["auroc"].value == pytest.approx(expected, abs=1e-12)
    missing = drawn(absent=(3,))
    assert metrics(missing, 0)["acc_macro"].value == pytest.approx(
        reference.recall_score(
            missing.labels, missing.predicted, labels=[0, 1, 2, *range(4, len(missing.classes))], average="macro"
        )
    )


def test_calibration_of_four_pictures_by_hand():
    probabilities = np.array([[0.95, 0.05], [0.95, 0.05], [0.35, 0.65], [0.4, 0.6]])
    outcome = Outcome(list("abcd"), np.array([0, 1, 1, 0]), probabilities, ("x", "y"))
    bins = calibration(outcome, bins=10)
    assert [(each.low, each.high, each.count) for each in bins if each.count] == [(0.5, 0.6, 1), (0.6, 0.7, 1), (0.9, 1.0, 2)]
    assert (bins[9].confidence, bins[9].accuracy) == pytest.approx((0.95, 0.5))
    # 1/4 · |0 - 0.6| + 1/4 · |1 - 0.65| + 2/4 · |0.5 - 0.95|
    assert ece(outcome, bins=10) == pytest.approx(0.15 + 0.0875 + 0.225)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """A model is right on 80 % of all pictures there are; 400 times 250 of them are drawn and measured.

    Of 400 intervals of 95 % that cover independently, fewer than 366 or more than 393 cover once in a thousand times each; the
    percentile bootstrap itself falls a little short of its level (by about half a point at this size).
    """
    rng = np.random.default_rng(0)
    covered = {"acc": 0, "acc_macro": 0, "brier": 0}
    share = {0: 0.9, 1: 0.7}  # of each class, recognised with a confidence of 0.8
    truth = {"acc": 0.8, "acc_macro": 0.8, "brier": 2 * (0.8 * 0.2**2 + 0.2 * 0.8**2)}
    for trial in range(400):
        labels = rng.integers(0, 2, 250)
        right = rng.random(250) < np.where(labels == 0, share[0], share[1])
        predicted = np.where(right, labels, 1 - labels)
        probabilities = np.where(np.eye(2)[predicted] == 1, 0.8, 0.2)
        found = metrics(Outcome([""] * 250, labels, probabilities, ("a", "b")), resamples=400, seed=trial)
        for name in covered:
            covered[name] += found[name].low <= truth[name] <= found[name].high
    for name, times in covered.items():
        assert 366 <= times <= 393, (name, times)


def test_where_predictions_go_wrong():
    probabilities = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.9, 0.0], [0.05, 0.05, 0.9]])
    outcome = Outcome(list("abcde"), np.array([0, 1, 0, 0, 2]), probabilities, ("x", "y", "z"))
    assert worst_mistakes(outcome, 2) == [3, 2]
    assert worst_mistakes(outcome, 9) == [3, 2, 1]
    assert confused_pairs(outcome, 9) == [(0, 1, 2), (1, 0, 1)]
    assert selective(outcome, 0.7) == (0.8, 0.5)
    assert selective(outcome, 0.95)[0] == 0
    assert math.isnan(selective(outcome, 0.95)[1])
