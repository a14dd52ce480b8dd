"""The metrics of a split against scikit-learn, summed up over uneven batches."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, recall_score, top_k_accuracy_score

from finetune.metrics import MeanLoss, build_metrics


def numbers(classes, number=101):
    rng = np.random.default_rng(classes)
    labels = rng.choice(classes, number, p=np.arange(1, classes + 1) / sum(range(1, classes + 1)))  # uneven classes
    labels[:classes] = range(classes)
    logits = rng.normal(size=(number, classes)) + 1.5 * np.eye(classes)[labels]
    return logits, labels


@pytest.mark.parametrize("classes", [2, 5, 6, 10])
@pytest.mark.parametrize("split", ["val", "test"])
def test_against_scikit_learn(classes, split):
    logits, labels = numbers(classes)
    metrics = build_metrics(split, classes)
    for part in np.split(np.arange(len(labels)), [7, 64, 100]):
        metrics.update(torch.from_numpy(logits[part]), torch.from_numpy(labels[part]))
    guess = logits.argmax(1)
    expected = {
        f"{split}/acc": accuracy_score(labels, guess),
        f"{split}/acc_macro": balanced_accuracy_score(labels, guess),
        f"{split}/f1": f1_score(labels, guess, average="macro"),
    }
    if classes > 5:  # with five classes the top five are always right
        expected[f"{split}/acc_top5"] = top_k_accuracy_score(labels, logits, k=5)
    assert {name: float(value) for name, value in metrics.compute().items()} == pytest.approx(expected, abs=1e-6)


def test_training_counts_what_is_right_and_starts_anew_after_a_reset():
    metrics = build_metrics("train", 10)
    logits, labels = (torch.from_numpy(values) for values in numbers(10))
    metrics.update(logits, labels)
    metrics.reset()
    metrics.update(torch.eye(10)[:4], torch.tensor([0, 1, 2, 9]))
    assert {name: float(value) for name, value in metrics.compute().items()} == {"train/acc": 0.75}


def test_the_mean_loss_is_that_of_the_pictures():
    losses, parts = np.random.default_rng(0).random(101), [7, 64, 100]
    mean, without = MeanLoss(), MeanLoss(finite=True)
    for part in np.split(losses, parts):
        for metric in (mean, without):
            metric.update(torch.tensor(part.mean()), len(part))
    without.update(torch.tensor(float("nan")), 50)
    without.update(torch.tensor(float("inf")), 50)
    assert float(mean.compute()) == pytest.approx(losses.mean(), rel=1e-6)
    assert float(without.compute()) == float(mean.compute())
    mean.update(torch.tensor(float("nan")), 1)
    assert np.isnan(float(mean.compute()))


def test_a_first_batch_that_is_all_right_ties_no_metrics_together():
    """torchmetrics shares the counts of metrics that are equal after the first batch, unless told which ones are alike."""
    labels = torch.arange(8).repeat(2)
    certain = torch.eye(8)[labels]
    metrics = build_metrics("val", 8)
    metrics.update(certain, labels)
    metrics.update(-certain, labels)  # the right class comes last
    second = certain.clone()
    second[torch.arange(16), (labels + 1) % 8] = 2.0  # the right class comes second
    metrics.update(second, labels)
    found = {name: float(value) for name, value in metrics.compute().items()}
    assert found == pytest.approx({"val/acc": 1 / 3, "val/acc_macro": 1 / 3, "val/acc_top5": 2 / 3, "val/f1": found["val/f1"]})


def test_classes_without_pictures_do_not_count_in_the_mean_recall():
    logits, labels = numbers(6)
    held = labels != 5
    metrics = build_metrics("val", 6)
    metrics.update(torch.from_numpy(logits[held]), torch.from_numpy(labels[held]))
    guess = logits[held].argmax(1)
    assert 5 in guess
    expected = recall_score(labels[held], guess, labels=range(5), average="macro")
    assert float(metrics.compute()["val/acc_macro"]) == pytest.approx(expected, abs=1e-6)
