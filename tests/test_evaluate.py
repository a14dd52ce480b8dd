"""Evaluation against scikit-learn on the table that it writes; which pictures are meant; calibration from end to end."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as reference

from finetune import ConfigError, DataError
from finetune.evaluate import evaluate
from finetune.labelled import own_pictures, pictures_in
from finetune.main import main
from finetune.outcomes import read_outcome
from finetune.predictor import Predictor
from finetune.trained import open_trained

RUN = "runs/mine/1"
CLASSES = ("bee", "ant, red", "wasp", "fly")


@pytest.fixture
def labelled(world):
    """Some pictures of each class but one."""
    sources = sorted(path for path in Path("new").rglob("*") if path.is_file())
    for label, name in enumerate(CLASSES[:3]):
        for index in range(2 + label):
            target = Path("labelled", name, f"{index}{sources[(label + index) % 5].suffix}")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(sources[(label + index) % 5], target)
    return world


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("labelled")
def test_all_that_is_written_is_what_scikit_learn_says_of_the_predictions(capsys):
    main(["evaluate", RUN, "labelled", "--resamples", "50", "--threshold", "0.4", "1.0"])
    said = capsys.readouterr().out
    target = Path(RUN, "evaluation", "labelled")
    assert sorted(path.name for path in target.iterdir()) == [
        ".resnet-finetune",
        "confusion.csv",
        "metrics.json",
        "per_class.csv",
        "predictions.csv",
        "report.html",
    ]
    table = read(target / "predictions.csv")
    true, predicted = ([row[column] for row in table] for column in ("true", "label"))
    assert true == [name for number, name in ((3, "ant, red"), (2, "bee"), (4, "wasp")) for _ in range(number)]
    np.testing.assert_allclose(
        [[float(row[f"p:{name}"]) for name in CLASSES] for row in table],
        Predictor(RUN).probabilities([row["file"] for row in table]),
        atol=1e-6,
    )
    report = json.loads((target / "metrics.json").read_text())
    found = {name: bounds["value"] for name, bounds in report["metrics"].items()}
    names = sorted({*true, *predicted})
    assert found["acc"] == pytest.approx(reference.accuracy_score(true, predicted))
    assert found["f1"] == pytest.approx(reference.f1_score(true, predicted, average="macro", labels=names, zero_division=0))
    assert found["nll"] == pytest.approx(
        reference.log_loss(true, [[float(row[f"p:{n}"]) for n in sorted(CLASSES)] for row in table], labels=sorted(CLASSES)),
        rel=1e-5,
    )
    assert all(bounds["low"] <= bounds["value"] <= bounds["high"] for n, bounds in report["metrics"].items() if n == "acc")
    matrix = [[int(row[name]) for name in CLASSES] for row in read(target / "confusion.csv")]
    np.testing.assert_array_equal(matrix, reference.confusion_matrix(true, predicted, labels=CLASSES))
    columns = reference.precision_recall_fscore_support(true, predicted, labels=CLASSES, zero_division=0)
    for name, expected in zip(("precision", "recall", "f1", "support"), columns, strict=True):
        assert [float(row[name]) for row in read(target / "per_class.csv")] == pytest.approx(list(expected), abs=1e-6)
    sure = [float(row["probability"]) >= 0.4 for row in table]
    right = [row["true"] == row["label"] for row, answered in zip(table, sure, strict=True) if answered]
    assert report["selective"][0]["coverage"] == pytest.approx(np.mean(sure))
    assert report["selective"][0]["accuracy"] == pytest.approx(np.mean(right))
    assert report["selective"][1] == {"threshold": 1.0, "coverage": 0.0, "accuracy": None}
    assert "labelled: 9 pictures of 4 classes" in said
    assert f"{found['acc']:.4f}" in said


@pytest.mark.usefixtures("labelled")
def test_nothing_is_overwritten_and_unreadable_pictures_are_named(capsys):
    Path("labelled/bee/bad.png").write_bytes(b"")
    evaluate(RUN, "labelled", out="mine", resamples=0)
    assert "1 pictures cannot be read and are left out" in capsys.readouterr().out
    assert len(read_outcome("mine/predictions.csv")) == 9
    with pytest.raises(ConfigError, match="mine exists already"):
        evaluate(RUN, "labelled", out="mine")
    evaluate(RUN, "labelled", out="mine", resamples=0, overwrite=True, tta="flip")
    assert json.loads(Path("mine/metrics.json").read_text())["tta"] == "flip"
    for path in Path("labelled").rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="None of the 10 pictures of labelled can be read"):
        evaluate(RUN, "labelled", out="other")
    assert not Path("other").exists()


@pytest.mark.usefixtures("labelled")
def test_which_pictures_are_meant():
    Path("labelled/bee/up").symlink_to("..")  # would make every picture a bee
    whole = pictures_in("labelled", CLASSES)
    Path("labelled/bee/up").unlink()
    assert (whole.name, len(whole.files)) == ("labelled", 9)
    for file, label in zip(whole.files, whole.labels, strict=True):
        assert Path(file).parent.name == CLASSES[label]
    for split in ("train", "val"):
        shutil.copytree("labelled", f"split/{split}")
    shutil.rmtree("split/val/bee")
    assert len(pictures_in("split", CLASSES).files) == 7  # val
    assert pictures_in("split", CLASSES, "train").name == "split train"
    with pytest.raises(DataError, match="no split 'test', it has: train, val"):
        pictures_in("split", CLASSES, "test")
    with pytest.raises(DataError, match="not split into train, val and test"):
        pictures_in("labelled", CLASSES, "val")
    Path("labelled/wasp").rename("labelled/wesp")
    with pytest.raises(DataError, match=r"holds 'wesp', which is no class of the model. Did you mean 'wasp'?"):
        pictures_in("labelled", CLASSES)
    with pytest.raises(DataError, match="holds 2 pictures but no class folders"):
        pictures_in("labelled/bee", CLASSES)
    Path("hollow/bee").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no picture of a class of the model"):
        pictures_in("hollow", CLASSES)
    with pytest.raises(DataError, match=r"does not say which folder its images were in\. Name a folder with its classes"):
        own_pictures(Path(RUN, "checkpoints", "best.ckpt"), CLASSES)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--split", "text"], "Unknown split 'text'"),
        (["--threshold", "1.5"], "between 0 and 1"),
        (["--resamples", "-1"], "at least 0"),
        (["--tresh", "1"], "There is no option '--tresh'. Did you mean '--threshold'?"),
        (["--out", "new/a.bmp/x"], "cannot be written"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("labelled")
def test_mistakes(capsys, options, says):
    with pytest.raises(SystemExit) as left:
        main(["evaluate", RUN, "labelled", *options])
    assert left.value.code == 2
    assert says in capsys.readouterr().err


def test_a_run_is_measured_and_calibrated_on_its_own_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--model.backbone", "test_resnet", "--model.weights", "none", "--data.image_size", "32", "--data.workers", "0"]
    options += [
        "--data.test_fraction",
        "0.3",
        "--trainer.max_epochs",
        "3",
        "--trainer.accelerator",
        "cpu",
        "--model.freezing",
        "full",
    ]
    main(["fit", "--config", "small", *options, "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"])
    said = capsys.readouterr().out
    (run,) = Path("runs/small").iterdir()
    main(["evaluate", str(run), "--workers", "0"])
    report = json.loads((run / "evaluation" / "digits-test" / "metrics.json").read_text())
    assert float(re.search(r"test/acc +(\S+)", said)[1]) == pytest.approx(report["metrics"]["acc"]["value"], abs=1e-4)
    on_val, losses = ["evaluate", str(run), "--split", "val", "--workers", "0", "--resamples", "0", "--overwrite"], []
    main(on_val)
    losses.append(json.loads((run / "evaluation" / "digits-val" / "metrics.json").read_text())["metrics"]["nll"]["value"])
    main(["evaluate", str(run), "--calibrate", "--overwrite", "--workers", "0", "--resamples", "0"])
    assert "is stored in" in capsys.readouterr().out
    report = json.loads((run / "evaluation" / "digits-test" / "metrics.json").read_text())
    assert report["temperature"] == open_trained(run).temperature != 1
    main(on_val)  # where the temperature was fitted it is better for sure
    losses.append(json.loads((run / "evaluation" / "digits-val" / "metrics.json").read_text())["metrics"]["nll"]["value"])
    assert losses[1] < losses[0]
