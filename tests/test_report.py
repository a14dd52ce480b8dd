"""The report, read with the standard library's parser: whole, self-contained, right, and safe whatever things are called."""

import json
import re
import sys
from pathlib import Path

import pytest
from sklearn.metrics import precision_recall_fscore_support
from tiny import TINY

from finetune.main import main
from finetune.outcomes import read_outcome
from finetune.report import write_report

FIGURES = {"loss", "metrics", "learning_rates", "gradient_flow", "update_ratio", "weight_distance"}
FIGURES |= {"confusion", "confusion_normalised", "confused_pairs", "per_class", "reliability"}


def test_the_report_of_a_whole_run(past_run, read_page):
    run = past_run()
    (run / "augmented.jpg").write_bytes(b"jpeg")
    path = write_report(run)
    assert path == run / "report.html"
    page = read_page(path)
    page.assert_self_contained()
    assert "://" not in path.read_text()
    assert FIGURES | {"augmented"} <= set(page.ids())
    text = " ".join(page.text)
    assert "resnet-finetune fit --config small --data.root" in text
    assert "in epoch 3" in text
    assert "1 min 15 s" in text
    assert ["stage", "parameters", "learning rate", "epochs 1 to 2", "epochs 3 to 4"] in page.rows
    assert ["stem", "1,000", "0.001", "frozen", "trains"] in page.rows


def test_warnings_of_the_training_stand_at_the_top(past_run, read_page):
    run = past_run()
    record = json.loads((run / "record.json").read_text())
    (run / "record.json").write_text(json.dumps({**record, "warnings": ["the weights explode: <b>layer3</b> by 0.5 times"]}))
    text = " ".join(read_page(write_report(run)).text)
    assert "Warning: the weights explode: <b>layer3</b> by 0.5 times" in text


def test_the_table_of_classes_equals_scikit_learn(past_run, read_page):
    run = past_run(pictures=200)
    found = read_outcome(run / "predictions.val.csv")
    expected = precision_recall_fscore_support(found.labels, found.predicted, zero_division=0)
    rows = {row[0]: row[1:5] for row in read_page(write_report(run)).rows if row and row[0] in found.classes}
    for number, name in enumerate(found.classes):
        precision, recall, f1, support = (float(column[number]) for column in expected)
        assert rows[name] == [f"{support:.0f}", f"{precision:.3f}", f"{recall:.3f}", f"{f1:.3f}"]


def test_mistakes_are_pictures_and_a_missing_one_is_said_to_be(past_run, read_page):
    run = past_run(pictures=40)
    found = read_outcome(run / "predictions.val.csv")
    wrong = [i for i in range(40) if found.predicted[i] != found.labels[i]]
    there = [i for i in wrong if i < 35]
    assert there
    assert len(there) < len(wrong) <= 24
    page = read_page(write_report(run))
    pictures = [a["src"] for tag, a in page.elements if tag == "img"]
    assert len(pictures) == len(there)
    assert all(source.startswith("data:image/jpeg;base64,") for source in pictures)
    assert " ".join(page.text).count("missing or unreadable") == len(wrong) - len(there)
    assert f"{len(wrong)} of {len(wrong)} wrong predictions" in " ".join(page.text)


def test_the_number_of_pictures_is_bounded(past_run, read_page):
    page = read_page(write_report(past_run(pictures=300)))
    assert sum(tag == "img" for tag, _ in page.elements) <= 24


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=http://evil.example/x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style></svg></title><b>",
    "{{ 7 * 7 }}{% raw %}",
    "$\\frac{1}{0}$",
    "a\x01\ufffe\u202eb",
    "javascript:alert(1)",
    "猫 & ünïcödé --> <!--",
]


def test_whatever_a_class_or_a_file_is_called_it_stays_text(past_run, read_page):
    run = past_run(name="x <b>&'/" + HOSTILE[2], classes=HOSTILE)
    plain = read_page(write_report(past_run(name="plain", classes=[f"class {n}" for n in range(len(HOSTILE))])))
    table = run / "predictions.val.csv"
    table.write_text(table.read_text().replace("val/", "<i>val/ onload='x'"))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("resnet18", "</pre><script>x</script>"))
    page = read_page(write_report(run))
    page.assert_self_contained()
    outside = [tag for tag, _ in page.elements if tag in ("script", "b", "i", "style", "title", "svg", "pre")]
    assert outside == [tag for tag, _ in plain.elements if tag in ("script", "b", "i", "style", "title", "svg", "pre")]
    assert "49" not in [row[0] for row in page.rows if row]
    assert {name for name in HOSTILE if "\x01" not in name} <= {row[0] for row in page.rows if row}


@pytest.mark.parametrize("kept", ["", "config.yaml", "metrics.csv", "record.json", "predictions.val.csv", "gradients.csv"])
def test_a_run_that_was_killed_has_a_report_of_what_there_is(past_run, read_page, kept):
    run = past_run()
    for path in run.iterdir():
        if path.name != kept:
            path.unlink()
    page = read_page(write_report(run))
    page.assert_self_contained()
    assert ("loss" in page.ids()) == (kept == "metrics.csv")
    assert ("confusion" in page.ids()) == (kept == "predictions.val.csv")
    if not kept:
        assert "Nothing was measured yet" in " ".join(page.text)


def test_the_test_split_comes_before_validation(past_run, read_page):
    run = past_run()
    (run / "predictions.test.csv").write_text((run / "predictions.val.csv").read_text())
    page = read_page(write_report(run))
    assert ["metric", "test (60 pictures)", "val (60 pictures)"] in page.rows
    assert "of the test pictures" in " ".join(page.text)


def test_a_running_run_says_so_and_how_it_goes_on(past_run, read_page):
    run = past_run()
    record = run / "record.json"
    record.write_text(record.read_text().replace("finished", "running"))
    text = " ".join(read_page(write_report(run)).text)
    assert "running" in text
    assert "--ckpt_path" not in text  # there is none yet
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").touch()
    assert "--ckpt_path" in " ".join(read_page(write_report(run)).text)


def test_two_hundred_classes(past_run, read_page):
    run = past_run(classes=[f"class {number:03}" for number in range(200)], pictures=400)
    page = read_page(write_report(run))
    assert set(page.ids()) >= FIGURES
    assert sum(bool(row) and row[0].startswith("class 1") for row in page.rows) == 100
    assert (run / "report.html").stat().st_size < 3_000_000


def test_the_guide_runs_as_written(past_run, tmp_path):
    guide = Path(__file__).parents[1] / "docs" / "report.md"
    (code,) = re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL)
    run = past_run()
    exec(compile(code, guide.name, "exec"), {"run": str(run), "out": tmp_path})
    assert (tmp_path / "confusion.pdf").read_bytes().startswith(b"%PDF")
    assert {"loss.png", "gradient_flow.png", "reliability.png"} <= {path.name for path in tmp_path.glob("*.png")}
    assert (run / "report.html").is_file()


SHORT = ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "2", "--model.freezing", "lp_ft"]


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """Return a function that trains for a moment and returns the run's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])

    def train(*words):
        main(["fit", *TINY, *SHORT, *words])
        (run,) = (tmp_path / "runs" / "run").iterdir()
        return run

    return train


@pytest.mark.filterwarnings("ignore:.*no pretrained weights.*")
def test_training_ends_with_a_report(fit, read_page):
    run = fit()
    page = read_page(run / "report.html")
    page.assert_self_contained()
    assert {"augmented", "loss", "metrics", "learning_rates", "confusion", "reliability"} <= set(page.ids())
    assert [row[0] for row in page.rows if row and row[0] in "0123456789"] == list("0123456789")
    images = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    assert len(images) == 26  # the sheet, the mistakes, and where the model looked
    assert "missing or unreadable" not in " ".join(page.text)


@pytest.mark.filterwarnings("ignore:.*no pretrained weights.*")
def test_a_report_that_fails_does_not_fail_the_training(fit, monkeypatch, capsys):
    monkeypatch.setattr("finetune.closing.write_report", lambda run: 1 / 0)
    run = fit()
    assert (run / "checkpoints" / "best.ckpt").is_file()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: The report")]
    assert said == [
        f"warning: The report could not be written (division by zero). Try again: resnet-finetune report runs/run/{run.name}"
    ]
