"""Runs side by side: what differs, whose value is best, and one page for it."""

import json
from pathlib import Path

import pytest
from sklearn.metrics import f1_score

from finetune.comparison import compare, differences, run_names
from finetune.errors import ConfigError
from finetune.main import main
from finetune.outcomes import read_outcome


@pytest.fixture
def two(past_run):
    one, other = past_run(name="small/1", lr=0.001), past_run(name="small/2", lr=0.01, seed=1)
    record = json.loads((other / "record.json").read_text())
    record["best"]["epoch"], record["seconds"], record["test"] = 1, 60.0, {"test/acc": 0.7}
    (other / "record.json").write_text(json.dumps(record))
    return [one, other]


def rows_of(page):
    return {row[0]: row[1:] for row in page.rows if row}


def starred(page):
    """The text of the cells that are marked as the best, by the first cell of their row."""
    return [attributes for tag, attributes in page.elements if tag == "td" and "best" in attributes["class"].split()]


def test_what_differs_and_whose_value_is_best(two, tmp_path, read_page):
    path = compare(two, tmp_path / "out.html")
    page = read_page(path)
    page.assert_self_contained()
    rows = rows_of(page)
    assert rows["model.lr"] == ["0.001", "0.01"]
    assert "model.backbone" not in rows
    assert rows["val/acc"] == ["0.8000", "0.7500"]
    assert rows["val/loss"] == ["0.3333", "0.5000"]
    assert rows["test/acc"] == ["0.6500", "0.7000"]
    assert rows["time"] == ["1 min 15 s", "1 min 0 s"]
    assert {"curve-0", "curve-1", "curve-2", "curve-3"} <= set(page.ids())
    assert "small/1" in " ".join(page.text)


def test_of_adaptations_the_target_comes_first_and_the_source_has_no_star(two, tmp_path, read_page):
    for run, target in zip(two, (0.4, 0.6), strict=True):
        lines = (run / "metrics.csv").read_text().splitlines()
        rows = [f"{lines[0]},oracle/target_acc,target/infomax"]
        rows += [f"{line},{target if 'val' else ''},1.5" if line.split(",")[1] else f"{line},," for line in lines[1:]]
        (run / "metrics.csv").write_text("\n".join(rows) + "\n")
    path = compare(two, tmp_path / "out.html")
    rows = rows_of(read_page(path))
    assert rows["oracle/target_acc"] == ["0.4000", "0.6000"]
    assert rows["target/infomax"] == ["1.5000", "1.5000"]
    assert list(rows).index("oracle/target_acc") < list(rows).index("target/infomax") < list(rows).index("val/acc")
    text = path.read_text()
    cells = {m: text.split(f'<th scope="row">{m}</th>')[1].split("</tr>")[0].split("<td")[1:] for m in rows if "/" in m}
    assert ["best" in cell for cell in cells["oracle/target_acc"]] == [False, True]
    assert not any("best" in cell for name in ("val/acc", "test/acc") for cell in cells[name])
    assert "what was measured there comes first" in text


@pytest.mark.parametrize(("metric", "best"), [("val/acc", 0), ("val/loss", 0), ("test/acc", 1), ("time", 1)])
def test_the_best_is_marked_also_where_less_is_better(two, tmp_path, metric, best):
    text = compare(two, tmp_path / "out.html").read_text()
    row = text.split(f'<th scope="row">{metric}</th>')[1].split("</tr>")[0]
    assert ["best" in cell for cell in row.split("<td")[1:]] == [best == 0, best == 1]


def test_f1_of_each_class_equals_scikit_learn(two, tmp_path, read_page):
    rows = rows_of(read_page(compare(two, tmp_path / "out.html")))
    for place, run in enumerate(two):
        found = read_outcome(run / "predictions.val.csv")
        for name, value in zip(found.classes, f1_score(found.labels, found.predicted, average=None), strict=True):
            assert rows[name][place] == f"{value:.3f}"


def test_equal_values_are_no_best(past_run, tmp_path, read_page):
    page = read_page(compare([past_run(name="a/1"), past_run(name="b/1")], tmp_path / "out.html"))
    assert not starred(page)
    assert "the same options were used" in " ".join(page.text)


def test_a_run_that_has_done_nothing_and_one_with_other_classes(past_run, tmp_path, read_page):
    empty = tmp_path / "runs" / "new"
    empty.mkdir(parents=True)
    (empty / "config.yaml").touch()
    runs = [past_run(name="a/1"), past_run(name="a/2", classes=("x", "y")), empty]
    page = read_page(compare(runs, tmp_path / "out.html"))
    assert rows_of(page)["val/acc"] == ["0.8000", "0.8000", ""]
    assert "cat" not in rows_of(page)
    read_page(compare([empty, runs[0]], tmp_path / "out.html"))


def test_other_pictures_are_said_to_be_others(two, tmp_path, read_page):
    said = "different pictures"
    assert said not in " ".join(read_page(compare(two, tmp_path / "out.html")).text)
    record = two[1] / "record.json"
    record.write_text(record.read_text().replace("beef", "f00d"))
    assert said in " ".join(read_page(compare(two, tmp_path / "out.html")).text)


def test_reports_are_linked_from_where_the_page_lies(two, tmp_path, read_page):
    (two[0] / "report.html").touch()
    page = read_page(compare(two, tmp_path / "out.html"))
    (link,) = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert (tmp_path / link).samefile(two[0] / "report.html")


def test_one_run_is_no_comparison(two, tmp_path):
    with pytest.raises(ConfigError, match="at least two different runs"):
        compare([two[0], two[0]], tmp_path / "out.html")


def test_options_that_only_one_run_has():
    found = list(differences([{"model.lr": 0.1, "run.name": "a", "seed": 1}, {"run.name": "b", "seed": 1}]))
    assert found == [{"name": "model.lr", "values": ["0.1", None]}]


def test_the_same_folder_in_two_places_has_two_names():
    assert run_names([Path("a/runs/x/1"), Path("b/runs/x/1"), Path("b/runs/y/1")]) == ["a/runs/x/1", "b/runs/x/1", "b/runs/y/1"]


def test_the_command(two, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["report", str(two[0])])
    assert capsys.readouterr().out.strip() == str(two[0] / "report.html")
    main(["report", *map(str, two)])
    assert capsys.readouterr().out.strip() == "comparison.html"
    main(["report", "last", "--out", "here.html"])
    assert (tmp_path / "here.html").read_text().startswith("<!doctype html>")
    for words, said in {("nowhere",): "There is no run", (str(tmp_path),): "is no run", (): "required"}.items():
        with pytest.raises(SystemExit):
            main(["report", *words])
        assert said in capsys.readouterr().err
