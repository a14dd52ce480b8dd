"""A method beside its floors: three trainings that differ in the method alone, and one table."""

import csv
import re

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import SMALL_PICTURES

from finetune.arguments import without
from finetune.compare import FLOORS
from finetune.main import main

TINY = [
    *SMALL_PICTURES,
    "--data.batch_size",
    "4",
    "--data.steps_per_epoch",
    "1",
    "--trainer.max_epochs",
    "1",
    "--run.gradients_every",
    "0",
]


def test_words_without_the_method():
    words = ["fit", "--model.adaptation=CDAN", "--model.adaptation.hidden", "8", "--model.adaptation_x", "1", "--model.lr", "2"]
    assert without(words, "--model.adaptation") == ["fit", "--model.adaptation_x", "1", "--model.lr", "2"]


def test_a_recipe_without_adaptation_is_refused_before_anything_trains(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "small", "--data.root", "digits", "--compare"])
    said = capfd.readouterr()
    for part in ("SourceOnly", "resnet-finetune adapt", "There is no option 'model.adaptation'"):
        assert part in said.err
    assert "===" not in said.out
    assert not (tmp_path / "runs").exists()


def test_a_method_and_its_floors_are_in_one_table(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for domain in ("source", "target"):
        for name in "ab":
            (tmp_path / domain / name).mkdir(parents=True)
            for i in range(6):
                pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / domain / name / f"{i}.png")
    words = ["--data.root", "source", "--data.target", "target", "--model.adaptation", "CDAN", "--model.adaptation.hidden", "4"]
    main(["adapt", *words, *TINY, "--compare"])
    said = capfd.readouterr().out
    rows = {line.split("  ")[0]: line for line in said.splitlines() if re.match(r"(as asked|SourceOnly|AdaBN)  ", line)}
    assert set(rows) == {"as asked", *FLOORS}
    (home,) = (tmp_path / "runs" / "domain_adaptation-compared").iterdir()
    options = {}
    for title, line in rows.items():
        (run,) = (home / title.replace(" ", "_")).iterdir()
        options[title] = yaml.safe_load((run / "config.yaml").read_text())
        with (run / "metrics.csv").open(newline="") as file:
            values = [row["oracle/target_acc"] for row in csv.DictReader(file) if row["oracle/target_acc"]]
        assert line.split()[-4] == line.split()[-2] == f"{float(values[0]):.4f}"
    methods = {title: config["model"]["init_args"].pop("adaptation") for title, config in options.items()}
    assert {title: one["class_path"].rpartition(".")[2] for title, one in methods.items()} == {
        "as asked": "CDAN",
        "SourceOnly": "SourceOnly",
        "AdaBN": "AdaBN",
    }
    assert methods["as asked"]["init_args"]["hidden"] == 4
    for config in options.values():
        config.pop("run")
    assert options["as asked"] == options["SourceOnly"] == options["AdaBN"]


def test_a_comparison_is_not_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["adapt", "--ckpt_path", "last", "--compare"])
    assert "--compare trains anew: leave out --ckpt_path" in capsys.readouterr().err
