"""What is read back of a run, whole or broken."""

import os
import shutil

import numpy as np
import pytest

from finetune.errors import CheckpointError
from finetune.report import write_report
from finetune.run_files import RunFiles, Span, find_run, flat


def test_curves_are_in_epochs_and_rates_by_step(past_run):
    files = RunFiles(past_run())
    assert files.steps_per_epoch == 10
    assert files.unit == "epoch"
    np.testing.assert_allclose(files.metrics["val/acc"], [[1, 2, 3, 4], [0.5, 0.75, 0.8, 0.7]])
    assert list(files.rates) == ["stem", "layer1", "head"]
    np.testing.assert_allclose(files.rates["head"].x, np.arange(0, 4, 0.5))
    assert files.spans == [Span(0, 2, "head"), Span(2, 4, "everything")]
    assert files.epochs_done == files.epochs_planned == 4
    assert files.best_epoch == 2
    assert files.at_best() == {"val/loss": pytest.approx(1 / 3), "val/acc": 0.8, "test/acc": 0.65}


def test_epochs_of_different_lengths_are_equally_long_on_the_axis(tmp_path):
    # two epochs of 8 steps, then, at a larger batch, two of 2 and the beginning of another
    rows = [
        *((step, "", 0.1, "") for step in (0, 4, 12, 16, 17, 19, 20, 21)),
        (7, 0, "", 0.5),
        (15, 1, "", 0.6),
        (17, 2, "", 0.7),
    ]
    rows += [(19, 3, "", 0.8)]
    lines = ["step,epoch,lr/head,val/acc", *(",".join(map(str, row)) for row in rows)]
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    files = RunFiles(tmp_path)
    np.testing.assert_allclose(files.rates["head"].x, [0, 0.5, 1.5, 2, 2.5, 3.5, 4, 4.5])
    np.testing.assert_allclose(files.metrics["val/acc"], [[1, 2, 3, 4], [0.5, 0.6, 0.7, 0.8]])
    assert files.epochs_done == 4


@pytest.mark.parametrize(("monitor", "epoch"), [("val/acc", 2), ("val/loss", 3)])
def test_the_best_epoch_without_a_record(past_run, monitor, epoch):
    run = past_run()
    (run / "record.json").unlink()
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("monitor: val/acc", f"monitor: {monitor}"))
    assert RunFiles(run).best_epoch == epoch
    assert list(RunFiles(run).rates) == ["stem", "layer1", "head"]


def test_before_the_first_epoch_has_ended_steps_are_counted(past_run):
    run = past_run()
    text = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text("".join(line for line in text.splitlines(keepends=True)[:4]))
    files = RunFiles(run)
    assert files.unit == "step"
    assert files.epochs_done == 0
    assert files.spans == []
    assert files.best_epoch == 2  # the record knows
    np.testing.assert_allclose(files.rates["head"].x, [0, 5, 10])


def test_a_line_that_was_cut_off_is_left_out(past_run):
    run = past_run()
    file = run / "metrics.csv"
    whole = RunFiles(run).metrics["val/acc"].y.tolist()
    file.write_text(file.read_text() + "45,0.1,0.")
    assert RunFiles(run).metrics["val/acc"].y.tolist() == whole
    file.write_bytes(file.read_bytes() + b"\0\0\0\xff\n")
    assert RunFiles(run).metrics["val/acc"].y.tolist() == whole


@pytest.mark.parametrize("name", ["record.json", "config.yaml", "metrics.csv", "gradients.csv", "predictions.val.csv"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"\0\xff", b"a,b\n1,2,3\n", b"[1, 2]"])
def test_what_is_missing_or_broken_is_empty(past_run, name, content):
    run = past_run()
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    files = RunFiles(run)
    found = {
        "record.json": files.record,
        "config.yaml": files.config,
        "metrics.csv": files.metrics,
        "gradients.csv": files.gradients,
        "predictions.val.csv": files.outcomes,
    }
    assert not found[name]
    assert sum(map(bool, found.values())) == 4
    files.at_best(), files.spans, files.rates, files.stages, files.epochs_done


def test_options_of_a_resumed_run_are_those_of_the_resume(past_run):
    run = past_run()
    (run / "config.resumed.yaml").write_text((run / "config.yaml").read_text().replace("max_epochs: 4", "max_epochs: 6"))
    assert RunFiles(run).epochs_planned == 6
    assert dict(flat(RunFiles(run).config))["model.backbone"] == "resnet18"


def test_a_run_is_found_by_its_folder_its_files_or_as_the_last(past_run, tmp_path):
    run = past_run()
    (run / "checkpoints").mkdir()
    checkpoint = run / "checkpoints" / "best.ckpt"
    checkpoint.touch()
    for what in (run, checkpoint, checkpoint.parent, run / "metrics.csv", "last"):
        assert find_run(str(what), tmp_path / "runs") == run


def test_a_report_that_is_written_later_makes_no_run_the_last(past_run, tmp_path):
    old = past_run()
    new = old.with_name("2026-02-01")
    shutil.copytree(old, new)
    for number, run in enumerate((old, new), start=1):
        for file in run.iterdir():
            os.utime(file, (number, number))
    (old / "report.html").touch()
    assert old.stat().st_mtime > 2
    assert find_run("last", tmp_path / "runs") == new


def test_what_is_no_run_is_refused_with_a_hint(past_run, tmp_path):
    run = past_run()
    (tmp_path / "config.yaml").touch()  # of a project, above
    with pytest.raises(CheckpointError, match=r"small is no run.*such as .*2026-01-31"):
        find_run(str(run.parent), tmp_path)
    with pytest.raises(CheckpointError, match="Did you mean '2026-01-31'"):
        find_run(str(run.parent / "2026-01-30"), tmp_path)
    with pytest.raises(CheckpointError, match="There is no run in"):
        find_run("last", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("record.json", b'{"stages": [{"stage": "head", "parameters": "many"}]}'),
        ("record.json", b'{"best": {"value": 0.5, "epoch": 1, "checkpoint": "../../other.ckpt"}}'),
        ("config.yaml", b"trainer: &a\n  trainer: *a\n"),
        ("config.yaml", b"trainer: 5\n"),
        ("metrics.csv", b"step,val/acc\n1," + b"9" * 200_000 + b"\n"),
        ("predictions.val.csv", b"file,true,label,probability,p:a,p:b\n0.png,a,a,nan,nan,0.5\n"),
        ("domains.json", b'{"a_distance": "x", "points": []}'),
    ],
)
def test_a_file_that_holds_something_else_counts_as_missing_and_is_named(past_run, name, content, capsys):
    run = past_run()
    (run / name).write_bytes(content)
    page = write_report(run).read_text()
    assert f"Left out: {run / name}" in page
    assert f"warning: {run / name}" in capsys.readouterr().err


def test_links_in_a_run_are_not_followed(past_run, tmp_path):
    run = past_run()
    (run / "record.json").rename(tmp_path / "elsewhere.json")
    (run / "record.json").symlink_to(tmp_path / "elsewhere.json")
    files = RunFiles(run)
    assert files.record == {}
    assert "is a link" in files.unreadable["record.json"]
