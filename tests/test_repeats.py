"""Several trainings in one table: what is planned, and mean and spread against the statistics module."""

import csv
import statistics
from types import SimpleNamespace

import pytest

from finetune import ConfigError
from finetune.main import main
from finetune.repeats import Repeats, plan_repeats, summary, table


def config(seeds=1, ckpt_path=None, fast_dev_run=False, **data):
    run = SimpleNamespace(seeds=seeds, folder="runs", name="small")
    found = {"ckpt_path": ckpt_path}
    trainer = SimpleNamespace(fast_dev_run=fast_dev_run)
    return SimpleNamespace(data={"init_args": data}, run=run, trainer=trainer, seed_everything=3, get=found.get)


def test_what_is_planned():
    assert plan_repeats(config()) is None
    assert plan_repeats(config(folds=5, fold=2)) is None
    assert plan_repeats(config(seeds=2, fast_dev_run=True)) is None  # it leaves no run to tabulate
    seeds = plan_repeats(config(seeds=2)).trainings()
    assert [name for name, _ in seeds] == ["seed-3", "seed-4"]
    assert seeds[1][1] == ["--seed_everything", "4", "--run.seeds", "1"]
    folds = plan_repeats(config(folds=3)).trainings()
    assert [name for name, _ in folds] == ["fold-1", "fold-2", "fold-3"]
    assert folds[2][1][:2] == ["--data.fold", "3"]
    both = [name for name, _ in plan_repeats(config(seeds=2, folds=2)).trainings()]
    assert both == ["seed-3-fold-1", "seed-3-fold-2", "seed-4-fold-1", "seed-4-fold-2"]


@pytest.mark.parametrize("seeds", [0, -2])
def test_no_training_at_all_is_a_mistake(seeds):
    with pytest.raises(ConfigError, match="at least 1"):
        plan_repeats(config(seeds=seeds))


def test_one_training_has_no_spread():
    assert "spread" not in table({"fold-1": {"val/acc": 0.5}})


def test_a_repeated_training_is_not_resumed():
    with pytest.raises(ConfigError, match="cannot be resumed as a whole"):
        plan_repeats(config(seeds=2, ckpt_path="x"))


def test_mean_and_spread():
    results = {"seed-0": {"val/acc": 0.5, "test/acc": 0.4}, "seed-1": {"val/acc": 0.7, "test/acc": 0.6}}
    mean, spread = summary(results)["val/acc"]
    assert mean == pytest.approx(0.6)
    assert spread == pytest.approx(statistics.stdev([0.5, 0.7]))
    assert "0.6000 ± 0.1414" in table(results)
    assert summary({"seed-0": {"val/acc": 0.5}}) == {"val/acc": (0.5, 0.0)}


SHORT = ["--model.backbone", "test_resnet", "--model.weights", "none", "--data.image_size", "32", "--data.workers", "0"]
SHORT += ["--trainer.max_epochs", "1", "--data.shots", "8", "--data.batch_size", "16", "--run.gradients_every", "0"]


def test_folds_are_trained_one_after_the_other_into_one_table(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", "scratch", *SHORT, "--data.folds", "2"])
    out = capfd.readouterr().out
    (results,) = tmp_path.glob("runs/scratch-repeated/*/results.csv")
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["training"] for row in rows] == ["fold-1", "fold-2", "mean", "spread"]
    mean = statistics.mean(float(row["val/acc"]) for row in rows[:2])
    assert float(rows[2]["val/acc"]) == pytest.approx(mean)
    assert f"{mean:.4f} ±" in out
    splits = [path.read_text() for path in results.parent.glob("fold-*/*/split.csv")]
    assert len(set(splits)) == 2


def test_a_failing_training_ends_the_rest_with_its_exit_code(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leaving:
        main(["fit", "--config", "scratch", *SHORT, "--run.seeds", "2", "--model.freezing", "last:99"])
    assert leaving.value.code
    assert "seed-0 ended with exit code" in capfd.readouterr().err
    assert not list(tmp_path.glob("runs/*/*/seed-1"))


def test_plans_are_values():
    assert Repeats("runs", "a", range(1)).trainings() == [("seed-0", ["--seed_everything", "0", "--run.seeds", "1"])]
