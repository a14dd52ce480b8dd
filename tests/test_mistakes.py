"""The choice of mistakes to look at, worked out by hand on eight pictures."""

import csv

import numpy as np

from finetune.mistakes import choose, mistakes_of
from finetune.outcomes import Outcome

CLASSES = ("ant", "bee", "cat")
ROWS = [  # file, true, probabilities
    ("0.png", 0, (0.9, 0.1, 0.0)),
    ("1.png", 0, (0.3, 0.7, 0.0)),  # ant taken for bee, at 0.7
    ("2.png", 0, (0.1, 0.9, 0.0)),  # and at 0.9
    ("3.png", 0, (0.4, 0.6, 0.0)),  # and at 0.6
    ("4.png", 1, (0.0, 0.2, 0.8)),  # bee for cat, at 0.8
    ("5.png", 2, (0.0, 0.45, 0.55)),
    ("6.png", 2, (0.55, 0.0, 0.45)),  # cat for ant, at 0.55
    ("7.png", 2, (0.0, 0.5, 0.5)),  # a tie goes to the first
]


def outcome():
    files, labels, probabilities = zip(*ROWS, strict=True)
    return Outcome(list(files), np.array(labels), np.array(probabilities), CLASSES)


def test_the_worst_and_examples_of_the_most_confused_pairs_each_once():
    assert list(choose(outcome(), worst=2, pairs=0)) == [2, 4]
    chosen = choose(outcome(), worst=1, pairs=1, examples=2)
    assert chosen == {2: "worst mistakes", 1: "ant taken for bee (3 times)"}
    assert set(choose(outcome())) == {1, 2, 3, 4, 6, 7}
    assert len(choose(outcome(), worst=2, pairs=2, examples=1)) <= 4


def test_mistakes_of_a_run(tmp_path):
    assert mistakes_of(tmp_path, None) == []
    with (tmp_path / "predictions.val.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "true", "label", "probability", *(f"p:{name}" for name in CLASSES)])
        for name, label, row in ROWS:
            writer.writerow([name, CLASSES[label], CLASSES[int(np.argmax(row))], max(row), *row])
    first = mistakes_of(tmp_path, str(tmp_path / "photos"))[0]
    assert first == (tmp_path / "photos" / "2.png", "2.png", "ant", "bee", 0.9, 0.1, "worst mistakes")
