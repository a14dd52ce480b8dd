"""Every recipe, end to end on built-in data, and what the list of recipes says."""

import csv

import pytest
import yaml

from finetune.main import main
from finetune.recipe_files import header, recipe_names, recipes_folder

SMALL = [
    "--model.backbone",
    "test_resnet",
    "--model.weights",
    "none",
    "--data.workers",
    "0",
    "--trainer.limit_train_batches",
    "3",
]


@pytest.mark.parametrize("name", [name for name in recipe_names() if name != "distill"])  # which test_distill.py runs
def test_recipe_runs_from_data_to_checkpoint(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", name, *SMALL, "--trainer.max_epochs", "3"])
    (run,) = (tmp_path / "runs" / name).iterdir()
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["val/acc"]]) == 3
    assert len([row for row in rows if row["test/acc"]]) == 1
    assert (run / "checkpoints" / "best.ckpt").is_file()


@pytest.mark.parametrize("name", recipe_names())
def test_header_says_purpose_data_command_overrides_and_expectation(name):
    path = recipes_folder() / f"{name}.yaml"
    lines = header(path)
    assert len(lines[0]) > 30
    assert len(lines[1]) > 30
    data, run = ("folders", "resnet-finetune distill") if name == "distill" else ("root/", f"--config {name}")
    for word, content in {"Data": data, "Run": run, "Override": "--model.", "Expect": ""}.items():
        assert any(line.startswith(word) and content in line for line in lines), word
    content = yaml.safe_load(path.read_text())
    assert [key for key in content if key != "run"] == ["model", "data", "trainer", "seed_everything"]
