"""Temperature scaling against a grid, and what is stored beside a checkpoint."""

import json

import numpy as np
import pytest
from sklearn.metrics import log_loss

from finetune.calibration import calibration_file, fit_temperature, scaled, store_temperature, stored_temperature
from finetune.errors import CheckpointError
from finetune.outcomes import Outcome
from finetune.scores import ece


def softmax(logits):
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def drawn(factor, number=4000, seed=0):
    """A model that knows the true probabilities, and multiplies its logits by a factor: its best temperature is that factor."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(number, 5)) * 2
    labels = np.array([rng.choice(5, p=row) for row in softmax(logits)])
    return Outcome([""] * number, labels, softmax(factor * logits), tuple("abcde")), softmax(logits)


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_a_factor_and_no_other_is_likelier(factor):
    outcome, truth = drawn(factor)
    found = fit_temperature(outcome)
    assert found == pytest.approx(factor, rel=0.06)
    best = log_loss(outcome.labels, scaled(outcome, found).probabilities)
    for other in (0.8 * found, 0.97 * found, 1.03 * found, 1.25 * found):
        assert log_loss(outcome.labels, scaled(outcome, other).probabilities) > best
    np.testing.assert_allclose(scaled(outcome, factor).probabilities, truth, atol=1e-9)
    np.testing.assert_array_equal(scaled(outcome, found).predicted, outcome.predicted)


def test_pictures_that_it_was_not_fitted_on_are_better_calibrated():
    fitted, held_out = drawn(3.0)[0], drawn(3.0, seed=1)[0]
    assert ece(scaled(held_out, fit_temperature(fitted))) < ece(held_out) / 4


def test_where_all_are_right_the_temperature_stays_finite():
    outcome = Outcome(["", ""], np.array([0, 1]), np.array([[0.9, 0.1], [0.2, 0.8]]), ("a", "b"))
    assert fit_temperature(outcome) == pytest.approx(1 / 20, rel=0.01)
    certain = Outcome(["", ""], np.array([0, 1]), np.array([[1.0, 0.0], [1.0, 0.0]]), ("a", "b"))
    assert 1 < fit_temperature(certain) <= 20


def test_what_is_stored_is_that_of_one_checkpoint(tmp_path):
    checkpoint = tmp_path / "best.ckpt"
    assert stored_temperature(checkpoint, 10) == 1
    path = store_temperature(checkpoint, 1.5, 10, {"pictures": 7})
    assert path == calibration_file(checkpoint) == tmp_path / "best.calibration.json"
    assert json.loads(path.read_text()) == {"temperature": 1.5, "step": 10, "pictures": 7}
    assert stored_temperature(checkpoint, 10) == 1.5
    assert stored_temperature(checkpoint, 11) == 1  # another checkpoint has taken its place
    for text in ("{", '{"temperature": -1, "step": 10}', "[]", '{"temperature": "hot"}'):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="does not hold a temperature"):
            stored_temperature(checkpoint, 10)
