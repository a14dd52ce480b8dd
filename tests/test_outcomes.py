"""The table of labelled predictions: what is written is read back, whatever the names are."""

import csv

import numpy as np
import pytest

from finetune.errors import DataError
from finetune.outcomes import Outcome, read_outcome, write_outcome


def test_a_table_comes_back_as_it_was(tmp_path):
    probabilities = np.array([[0.25, 0.75], [1.0, 0.0], [1e-12, 1 - 1e-12]])
    names = ('ant, "red"', "b\né")
    outcome = Outcome(["a\n,.png", "ü.png", "caf\udce9.png"], np.array([0, 0, 1]), probabilities, names)
    path = tmp_path / "new" / "predictions.val.csv"
    write_outcome(outcome, path)
    back = read_outcome(path)
    assert list(back.files) == list(outcome.files)
    assert back.classes == names
    np.testing.assert_array_equal(back.labels, outcome.labels)
    np.testing.assert_allclose(back.probabilities, probabilities, rtol=1e-8)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    with path.open(newline="", errors="surrogateescape") as handle:
        first = next(csv.DictReader(handle))
    assert (first["true"], first["label"], first["probability"]) == (names[0], names[1], "0.75")


def test_without_pictures(tmp_path):
    write_outcome(Outcome([], np.zeros(0, np.int64), np.zeros((0, 2)), ("a", "b")), tmp_path / "t.csv")
    assert read_outcome(tmp_path / "t.csv").probabilities.shape == (0, 2)


@pytest.mark.parametrize(
    "text",
    ["", "file,label\na,b\n", "file,true,label,probability,p:x\na,y,x,1,1\n", "file,true,label,probability,p:x\na,x,x,1,?\n"],
)
def test_another_table_is_refused(tmp_path, text):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(DataError, match="no table of labelled predictions"):
        read_outcome(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_outcome(tmp_path / "missing.csv")
