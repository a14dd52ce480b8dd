"""What is printed and what heads a column: one owner each, so that no name steers a terminal or a spreadsheet."""

import ast
import csv
import logging
import warnings
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from tiny import TINY

import finetune
from finetune.console import clean_messages, say, tell
from finetune.escaping import column
from finetune.main import main
from finetune.runs import RunLogger
from finetune.sample import digits_folder
from finetune.store import Store

PACKAGE = Path(finetune.__file__).parent
ESCAPE, FORMULA = "\x1b]0;owned\x07\x1b[2J\x9b1m", '=HYPERLINK("http://x","y")'


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_nothing_prints_but_the_owner(path):
    prints = [
        name for name in calls(path) if name.split(".")[-1] == "print" or name.endswith((".stdout.write", ".stderr.write"))
    ]
    own = {"self.print", "super().print"}  # of a FinetuneModule, which passes the owner
    assert path.stem == "console" or not set(prints) - own


def assert_harmless(text):
    assert "owned" in text
    assert not any(letter in text for letter in "\x1b\x07\x9b\r")


def test_what_is_said_and_told(capsys):
    say(f"a {ESCAPE}\nb")
    say(f"a {ESCAPE}", error=True)

    class Prints:
        print = staticmethod(print)

    tell(Prints(), ESCAPE)
    said = capsys.readouterr()
    assert_harmless(said.out)
    assert_harmless(said.err)
    assert said.out.count("\n") == 3


def test_a_module_prints_nothing_that_steers(capsys):
    module = finetune.FinetuneModule("test_resnet", num_classes=2, weights="none")
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    module.print(ESCAPE, 3)
    assert_harmless(capsys.readouterr().out)


def test_warnings_and_logs_of_libraries_are_cleaned(caplog):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with clean_messages():
            warnings.warn(f"file {ESCAPE}", UserWarning, stacklevel=1)
            warnings.warn("plain", DeprecationWarning, stacklevel=1)
            logging.getLogger("a.library").warning("file %s", ESCAPE)
            logging.getLogger("a.library").warning("plain %s", 1)
    assert_harmless(str(caught[0].message))
    assert [each.category for each in caught] == [UserWarning, DeprecationWarning]
    assert_harmless(caplog.messages[0])
    assert caplog.messages[1] == "plain 1"
    logging.getLogger("a.library").warning("%s", ESCAPE)
    assert caplog.messages[2] == ESCAPE  # outside of the command a program decides itself


@pytest.mark.parametrize("name", ["val/acc", FORMULA, "@a", "+1", "\t=1", ESCAPE, "'=1", "a,b"])
def test_a_head_of_a_column_is_harmless_and_stays_what_it_is(name):
    assert column(name)[:1] not in tuple("=+-@\t\r\n\x1b")
    assert column(column(name)) == column(name)
    assert column("val/acc") == "val/acc"


def heads(file):
    with file.open(newline="") as handle:
        return next(csv.reader(handle))


def test_metrics_whose_names_want_to_be_formulas(tmp_path):
    row = {FORMULA: 1.0, ESCAPE: 2.0, "val/acc": 0.5, "step": 9, "epoch": 0}
    for until in (None, 20, 20):  # a resumed run rewrites the file
        logger = RunLogger(tmp_path / "runs" / "a", until)
        logger.complete(row)
        logger.log_metrics({FORMULA: 3.0, "lr/head": 0.1}, step=10)
        logger.save()
    found = heads(tmp_path / "runs" / "a" / "metrics.csv")
    assert sorted(found) == sorted([*map(column, row), "lr/head"])
    assert not [name for name in found if name[:1] in tuple("=+-@") or "\x1b" in name]


def test_a_hostile_checkpoint_and_root_steer_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / f"photos{ESCAPE}"
    for split in ("train", "val"):
        for label in ("0", "1"):
            (root / split / label).mkdir(parents=True)
            for file in sorted((digits_folder() / split / label).iterdir())[:4]:
                (root / split / label / file.name).write_bytes(file.read_bytes())
    words = ["fit", "--config", "scratch", *TINY, "--data.batch_size", "4", "--trainer.max_epochs", "1"]
    main([*words, "--data.root", root.name, "--run.name", "mine", "--run.gradients_every", "0"])
    (run,) = (tmp_path / "runs" / "mine").iterdir()
    last = run / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    (saved,) = [state for state in content["callbacks"].values() if "row" in state]
    saved["row"] = {FORMULA: 1.0, ESCAPE: 2.0, "step": content["global_step"] - 1, "epoch": 0}
    torch.save(content, last)
    main(["fit", "--ckpt_path", str(run), "--trainer.max_epochs", "2"])
    main(["evaluate", str(run), "--workers", "0", "--resamples", "10"])
    said = capsys.readouterr()
    assert_harmless(said.out)
    assert "\x1b" not in said.err.replace("\x1b[A", "")
    found = heads(run / "metrics.csv")
    assert column(FORMULA) in found
    assert column(ESCAPE) in found
    assert not [name for name in found if name[:1] in tuple("=+-@") or "\x1b" in name]


def test_the_table_of_what_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RESNET_FINETUNE_CACHE", str(tmp_path))
    store = Store({"a": 1}, (2, 3), "float32", {"what": "resnet18", "pictures": f"train of photos{ESCAPE}"})
    store.make(lambda ranges: map(list, ranges), lambda rows: np.zeros((len(rows), 3), np.float32))
    main(["reuse"])
    assert_harmless(capsys.readouterr().out)
