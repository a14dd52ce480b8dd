"""What is seen of two domains after a run: the A-distance at its extremes, the map, the figures, and the table."""

import csv
import json

import numpy as np
import pytest

from finetune.domain_figures import of_domains, scaled
from finetune.domain_table import domain_table
from finetune.domains import a_distance, tsne
from finetune.outcomes import Outcome, write_outcome
from finetune.run_files import Curve, RunFiles

VALUES = [  # val/acc, infomax, oracle
    (0.7, 0.5, 0.3),
    (0.9, 0.8, 0.4),
    (0.8, 0.6, 0.6),
]


@pytest.fixture
def run(tmp_path):
    """The files of a run of three epochs of ten steps, whose validator is best in the second and whose oracle in the third."""
    folder = tmp_path / "domain_adaptation" / "1"
    folder.mkdir(parents=True)
    names = ["step", "epoch", "val/acc", "target/infomax", "oracle/target_acc", "train/domain_acc"]
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for epoch, (source, infomax, oracle) in enumerate(VALUES):
            writer.writerow([10 * epoch + 9, epoch, source, infomax, oracle, ""])
            writer.writerow([10 * epoch + 9, epoch, "", "", "", 0.9 - 0.1 * epoch])
    best = {"value": 0.8, "epoch": 1, "checkpoint": "checkpoints/best.ckpt"}
    (folder / "record.json").write_text(json.dumps({"monitor": "target/infomax", "mode": "max", "best": best}))
    for split, number in (("val", 6), ("target", 9)):
        labels = np.arange(number) % 3
        outcome = Outcome([f"{i}.png" for i in range(number)], labels, np.eye(3)[labels], ("a", "b", "c"))
        write_outcome(outcome, folder / f"predictions.{split}.csv")
    return folder


def test_a_distance_at_its_extremes_and_between():
    numbers = np.random.default_rng(0)
    same, other = numbers.normal(size=(2, 400, 5))
    assert a_distance(same, same + 50) == 2
    assert a_distance(same, other) < 0.3
    assert 0.6 < a_distance(same, other + 0.5) < 1.6
    assert a_distance(same[:40], other + 50) == 2  # however unlike their numbers are


def test_the_map_keeps_groups_apart():
    numbers = np.random.default_rng(0)
    features = np.concatenate([numbers.normal(size=(30, 5)), numbers.normal(size=(30, 5)) + 30])
    places = tsne(features)
    assert places.shape == (60, 2)
    centres = places[:30].mean(0), places[30:].mean(0)
    assert np.linalg.norm(centres[0] - centres[1]) > 2 * places[:30].std()


def test_the_table_has_what_was_chosen_and_the_oracle_side_by_side(run):
    rows = domain_table({"MCC": run}).splitlines()
    assert rows[0].split("  ")[0] == "method"
    assert "target, chosen by target/infomax" in rows[0]
    assert rows[2].split() == ["MCC", "0.9000", "0.4000", "2", "0.6000", "3"]


def test_the_table_of_a_target_without_labels(run):
    text = (run / "metrics.csv").read_text().replace("oracle/target_acc", "other")
    (run / "metrics.csv").write_text(text)
    assert domain_table({"MCC": run}).splitlines()[2].split() == ["MCC", "0.9000", "not", "known", "2"]


def test_figures(run):
    figures = of_domains(RunFiles(run))
    assert set(figures) == {"domain_accuracy", "validators", "confusion_source", "confusion_target"}
    (axes,) = figures["domain_accuracy"].axes
    drawn = {line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines}
    assert drawn["target (oracle)"] == ([1, 2, 3], [0.3, 0.4, 0.6])
    assert drawn["discriminator: which domain"][1] == pytest.approx([0.9, 0.8, 0.7])
    points = [[0.0, 1.0, "source", "a"], [1.0, 0.0, "source", "b"], [2.0, 2.0, "target", "a"]]
    (run / "domains.json").write_text(json.dumps({"a_distance": 1.25, "points": points}))
    figure = of_domains(RunFiles(run))["domain_features"]
    assert "A-distance 1.25" in figure.get_suptitle()
    source, target = figure.axes[0].collections
    assert source.get_offsets().tolist() == [[0, 1], [1, 0]]
    assert target.get_offsets().tolist() == [[2, 2]]
    assert len(source.get_facecolors()) == 0
    assert target.get_facecolors()[0].tolist() == source.get_edgecolors()[0].tolist()  # the same class


def test_a_run_of_another_kind_has_no_such_figures(past_run):
    assert of_domains(RunFiles(past_run())) == {}


def test_curves_are_scaled_one_by_one():
    found = scaled({"a": Curve(np.array([1.0, 2, 3]), np.array([5.0, 7, 6])), "flat": Curve(np.array([1.0]), np.array([4.0]))})
    assert found["a"].y.tolist() == [0, 1, 0.5]
    assert found["flat"].y.tolist() == [0]
