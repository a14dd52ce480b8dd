"""Attacks on the user's files: a handful of those of benchmarks/destroy.py, in this process, under its watch."""

import importlib
import sys
from pathlib import Path

import pytest

import finetune

pytestmark = pytest.mark.filterwarnings("ignore")
CHOSEN = {
    "evaluate RUN ..",
    "evaluate FILE .. beside the user's files",
    "evaluate --out mine --overwrite",
    "export beside a folder model.part",
    "predict, x.csv.part is a link",
    "reuse --clear with folders of the user's",
    "recipes --copy through a broken link",
    "report over a page of the user's",
    "resume, the best checkpoint names local://",
    "resume, metrics.csv is a link",
    "report, augmented.jpg is a link",
    "report, predictions name a pipe",
    "CSVLogger on another run",
    "run.name ../../x",
}


@pytest.fixture
def destroy(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.syspath_prepend(str(Path(finetune.__file__).parent.parent / "benchmarks"))
    yield importlib.import_module("destroy")
    for name in ("destroy", "destroy_code", "damage"):
        sys.modules.pop(name, None)


def test_nothing_of_the_users_is_changed_deleted_or_shown(destroy, tmp_path):
    groups = [destroy.output_names, destroy.temporary_names, destroy.paths_in_a_checkpoint, destroy.links_and_pipes]
    found = destroy.try_all(tmp_path, only=CHOSEN.__contains__, groups=[*groups, destroy.places_of_others])
    assert {attack.name for attack, _ in found} == CHOSEN
    assert {attack.name: result.changed for attack, result in found if result.changed or result.ran} == {}
    assert not [attack.name for attack, result in found if not isinstance(result.code, int | None)]
    assert destroy.leaks == []


def test_the_watch_sees_every_kind_of_change(destroy, tmp_path):
    for name in ("kept", "written", "deleted", "mode", "allowed/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to("kept")
    before = destroy.snapshot(tmp_path)
    (tmp_path / "written").write_text("other")
    (tmp_path / "deleted").unlink()
    (tmp_path / "mode").chmod(0o600)
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("written")
    (tmp_path / "allowed" / "x").unlink()
    (tmp_path / "allowedtoo").write_text("new")
    found = destroy.differences(before, destroy.snapshot(tmp_path), ("allowed",))
    assert found == ["+allowedtoo", "-deleted", "~link", "~mode", "~written"]
