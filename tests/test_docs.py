"""What README and guides show is run: the snippets as they stand, with a smaller network."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from tiny import NETWORK

import finetune
from finetune.findings import KINDS, SEVERITIES
from finetune.freezing import POLICIES, plan
from finetune.main import main

ROOT = Path(finetune.__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TINY = [*NETWORK, "--trainer.max_epochs", "2", "--trainer.limit_train_batches", "2"]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page):
    return [line.strip() for line in page.read_text().splitlines() if line.startswith("    resnet-finetune ")]


@pytest.mark.usefixtures("offline")
def test_readme_snippet_trains_and_tests(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    code = code.replace("max_epochs=5", "max_epochs=2, limit_train_batches=2, limit_val_batches=2, logger=False")
    exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "val/acc" in said
    assert "weights: bundled" in said


def test_extending_guide_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    page = ROOT / "docs" / "extending.md"
    for code in blocks(page, "python"):
        name = re.match(r"# (\w+\.py)\n", code)[1]
        (tmp_path / name).write_text(code)
    fits = [line for line in commands(page) if line.startswith("resnet-finetune fit")]
    assert len(fits) == 2
    for line in fits:
        main([*shlex.split(line)[1:], *TINY])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_options_in_the_text_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    kinds = finetune.DistillModule, finetune.AdaptModule  # which have the options of their base, too
    hparams = {name for kind in kinds for name in kind(backbone="test_resnet", num_classes=2, weights="none").hparams}
    modules = finetune.FolderDataModule, finetune.DistillDataModule, finetune.AdaptDataModule
    data = {name for kind in modules for name in kind("digits").hparams}
    for option in re.findall(r"--model\.([a-z_0-9]+)", text):
        assert option in hparams or f"{option}: int" in text, option  # or it is one of the page's own class
    for option in re.findall(r"--data\.([a-z_0-9]+)", text):
        assert option in data, option


def test_policies_of_the_freezing_guide_are_plans():
    text = (ROOT / "docs" / "freezing.md").read_text()
    table = text.split("## Policies")[1].split("Each is short")[0]
    names = re.findall(
        r"`([a-z_]+(?::[^`]*)?)`", " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    )
    assert {name.partition(":")[0] for name in names} == set(POLICIES)
    for name in names:
        assert plan(name, ["stem", "layer1", "layer2", "layer3", "layer4", "head"], 20)


def test_changelog_has_the_version():
    assert f"## [{finetune.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.usefixtures("world")
def test_the_guide_to_what_comes_after_runs_as_written():
    page = ROOT / "docs" / "after_training.md"
    for old, new in (("a.jpg", "new/a.bmp"), ("b.png", "new/b/2.png")):
        shutil.copy(new, old)
    for label in ("bee", "wasp"):
        shutil.copytree("new/b", f"labelled/{label}")
    (code,) = blocks(page, "python")
    variables = {}
    exec(compile(code.replace("runs/small/2026-01-31_12-00-00", "runs/mine/1"), page.name, "exec"), variables)
    assert variables["probabilities"].shape == (1, 4)
    ran = set()
    for line in commands(page):
        words = ["runs/mine/1" if word == "RUN" else word for word in shlex.split(line)[1:]]
        if "--mistakes" in words:  # of a run that measured itself
            continue
        words += {"explain": ["--neighbours", "0"], "export": ["--pictures", "new"]}.get(words[0], [])
        main(words)
        ran.add(words[0])
    assert ran == {"predict", "evaluate", "explain", "export"}


def test_the_guide_to_damaged_data_names_every_kind():
    text = (ROOT / "docs" / "damaged_data.md").read_text()
    assert set(re.findall(r"`([a-z]+(?:-[a-z]+)*)`", text)) >= set(KINDS)
    for severity, part in zip(SEVERITIES, re.split(r"\nA (?:warning|note) is ", text.split("## In training")[0]), strict=True):
        assert {kind for kind, each in KINDS.items() if each.severity == severity} <= set(re.findall(r"`([a-z-]+)`", part))
