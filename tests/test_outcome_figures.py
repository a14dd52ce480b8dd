"""Numbers in figures of predictions equal those of scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix as reference_confusion
from sklearn.metrics import precision_recall_fscore_support

from finetune.outcome_figures import MANY, confused_pairs, confusion_matrix, per_class_scores, picture_grid, reliability
from finetune.outcomes import Outcome

pytestmark = pytest.mark.filterwarnings("ignore:.*ill-defined")


def outcome(classes=5, pictures=300, seed=0, right=1.5):
    numbers = np.random.default_rng(seed)
    labels = numbers.integers(0, classes, pictures)
    scores = numbers.normal(size=(pictures, classes))
    scores[np.arange(pictures), labels] += right
    shares = np.exp(scores)
    names = tuple(f"class {number}" for number in range(classes))
    return Outcome([f"{n}.jpg" for n in range(pictures)], labels, shares / shares.sum(1, keepdims=True), names)


def cells(figure):
    """The numbers written into a matrix, by row and column."""
    return {tuple(int(place) for place in reversed(text.get_position())): text.get_text() for text in figure.axes[0].texts}


def ticks(axis):
    return [text.get_text() for text in axis.get_ticklabels()]


@pytest.mark.parametrize("classes", [2, 5, 12])
def test_confusion_equals_scikit_learn(classes):
    found = outcome(classes)
    expected = reference_confusion(found.labels, found.predicted, labels=range(classes))
    figure = confusion_matrix(found)
    assert cells(figure) == {(i, j): str(expected[i, j]) for i, j in np.argwhere(expected)}
    assert ticks(figure.axes[0].yaxis) == ticks(figure.axes[0].xaxis) == list(found.classes)
    normal = reference_confusion(found.labels, found.predicted, labels=range(classes), normalize="true")
    shown = cells(confusion_matrix(found, normalised=True))
    assert shown == {(i, j): f"{100 * normal[i, j]:.0f}" for i, j in np.argwhere(expected)}


def test_a_class_without_pictures_has_an_empty_row():
    found = Outcome(["a", "b"], np.array([0, 0]), np.array([[0.9, 0.1], [0.2, 0.8]]), ("x", "y"))
    assert cells(confusion_matrix(found, normalised=True)) == {(0, 0): "50", (0, 1): "50"}


def test_of_many_classes_those_with_mistakes_are_shown():
    found = outcome(200, 1000, right=4.0)
    expected = reference_confusion(found.labels, found.predicted, labels=range(200))
    mistakes = expected.sum(0) + expected.sum(1) - 2 * np.diag(expected)
    figure = confusion_matrix(found)
    names = ticks(figure.axes[0].yaxis)
    assert len(names) == MANY
    assert min(mistakes[int(name.split()[1])] for name in names) >= np.sort(mistakes)[-MANY]
    assert "30 of 200" in figure.get_suptitle()
    figure.canvas.draw()


@pytest.mark.parametrize("classes", [2, 7, 200])
def test_precision_and_recall_equal_scikit_learn(classes):
    found = outcome(classes, 600)
    precision, recall, f1, _ = precision_recall_fscore_support(
        found.labels, found.predicted, labels=range(classes), zero_division=0
    )
    figure = per_class_scores(found)
    axes = figure.axes[0]
    shown = [int(name.split()[1]) for name in ticks(axes.yaxis)]
    assert len(shown) == min(classes, MANY)
    assert f1[shown].tolist() == sorted(f1)[: len(shown)]
    lines = {line.get_label().split(":")[0]: line.get_xdata() for line in axes.lines}
    np.testing.assert_allclose(lines["precision"], precision[shown])
    np.testing.assert_allclose(lines["recall"], recall[shown])
    low, high = axes.get_xlim()
    assert low <= min(precision[shown].min(), recall[shown].min())
    assert high >= 1


def test_pairs_are_counted_from_the_predictions():
    found = outcome(4, 100)
    wrong = found.predicted != found.labels
    expected = {}
    for true, said in zip(found.labels[wrong], found.predicted[wrong], strict=True):
        name = f"class {true} → class {said}"
        expected[name] = expected.get(name, 0) + 1
    axes = confused_pairs(found).axes[0]
    shown = dict(zip(ticks(axes.yaxis), (int(bar.get_width()) for bar in axes.patches), strict=True))
    assert shown == expected
    assert list(shown.values()) == sorted(shown.values(), reverse=True)


def test_without_mistakes_there_are_no_pairs():
    found = Outcome(["a", "b"], np.array([0, 1]), np.eye(2), ("x", "y"))
    assert confused_pairs(found) is None
    for figure in (confusion_matrix(found), per_class_scores(found), reliability(found)):
        figure.canvas.draw()


def test_reliability_of_a_case_by_hand():
    # three pictures at 0.9 of which two are right, one at 0.6 that is right: ECE (3 * |2/3 - 0.9| + |1 - 0.6|) / 4 = 0.275
    shares = np.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.6, 0.4]])
    found = Outcome(list("abcd"), np.array([0, 0, 0, 0]), shares, ("x", "y"))
    figure = reliability(found, bins=10)
    assert "0.275" in figure.get_suptitle()
    is_right = figure.axes[0].containers[0]
    assert [(round(bar.get_x(), 9), bar.get_height()) for bar in is_right] == [(0.503, 1.0), (0.803, pytest.approx(2 / 3))]
    assert [bar.get_height() for bar in figure.axes[1].patches] == [1, 3]


def test_a_grid_shows_what_is_missing():
    picture = np.zeros((4, 6, 3), np.uint8)
    figure = picture_grid("Mistakes", [picture, None, picture], ["cat\ndog", "$owl", ""], columns=2)
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 2
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["missing"]
    figure.canvas.draw()


@pytest.mark.parametrize("name", ["$\\frac", "a" * 300, "<script>", "a\x01b\nc", "\ud800", "猫", "", "$x$ & $y$"])
def test_any_name_can_be_drawn(name):
    found = outcome(3, 30)
    found = Outcome(found.files, found.labels, found.probabilities, (name, "x", "y"))
    from finetune.figures import png, svg

    for figure in (confusion_matrix(found), per_class_scores(found), confused_pairs(found)):
        assert png(figure).startswith(b"\x89PNG")
        assert "<script" not in svg(figure, "x")
