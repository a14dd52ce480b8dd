"""Paths in a checkpoint's states are rebuilt: nothing outside of a callback's own folder is ever deleted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint

from finetune.kept_states import own_state


def callback(folder, mode="max"):
    return ModelCheckpoint(folder, "best", monitor="val/acc", mode=mode)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for name in ("a.ckpt", "b.ckpt", "notes.txt"):
        (folder / name).write_text("x")
    (folder / "folder.ckpt").mkdir()
    (tmp_path / "mine.ckpt").write_text("mine")
    (folder / "link.ckpt").symlink_to(tmp_path / "mine.ckpt")
    return tmp_path / "run"


@pytest.mark.parametrize(("mode", "worst", "value"), [("max", "a.ckpt", 0.25), ("min", "b.ckpt", 0.5)])
def test_paths_of_a_run_that_was_moved_are_those_of_now(run, mode, worst, value):
    old = "/elsewhere/run/checkpoints"
    state = {
        "dirpath": old,
        "best_k_models": {f"{old}/a.ckpt": torch.tensor(0.25), f"{old}/b.ckpt": torch.tensor(0.5)},
        "kth_best_model_path": "/etc/passwd",
        "kth_value": torch.tensor(9.0),
        "best_model_path": f"{old}/b.ckpt",
        "best_model_score": torch.tensor(0.5),
        "last_model_path": "",
        "more": "/home",
    }
    found = own_state(callback(run / "checkpoints", mode), state, {}, run)
    place = str(run / "checkpoints")
    assert found["dirpath"] == place
    assert {path: float(score) for path, score in found["best_k_models"].items()} == {
        f"{place}/a.ckpt": 0.25,
        f"{place}/b.ckpt": 0.5,
    }
    assert (found["kth_best_model_path"], float(found["kth_value"])) == (f"{place}/{worst}", value)
    assert found["best_model_path"] == f"{place}/b.ckpt"
    assert "more" not in found
    loaded = callback(run / "checkpoints", mode)
    loaded.load_state_dict(found)
    assert loaded.best_model_path == f"{place}/b.ckpt"


HOSTILE = ["local:///home", "..", ".", "", "/", "a.ckpt/..", "notes.txt", "folder.ckpt", "link.ckpt", "gone.ckpt", "a\0.ckpt"]


@pytest.mark.parametrize("path", [*HOSTILE, None, 5, ["a.ckpt"]])
def test_what_is_no_checkpoint_of_the_run_is_dropped(run, path):
    state = {"best_k_models": {str(path): torch.tensor(1.0)}, "best_model_path": path, "last_model_path": path}
    found = own_state(callback(run / "checkpoints"), state, {}, run)
    assert found["best_k_models"] == {}
    assert (found["kth_best_model_path"], found["best_model_path"], found["last_model_path"]) == ("", "", "")


@given(st.recursive(st.none() | st.text() | st.floats() | st.integers(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
@settings(deadline=None, derandomize=True, database=None, max_examples=50)
def test_any_state_leads_nowhere_else(tmp_path_factory, value):
    run = tmp_path_factory.getbasetemp()
    for state in (value, dict.fromkeys(("best_k_models", "best_model_path", "dirpath"), value)):
        found = own_state(callback(run / "checkpoints"), state, {}, run)
        assert found["best_k_models"] == {}
        assert found["best_model_path"] == found["last_model_path"] == ""


@pytest.mark.parametrize("change", [None, "options", "score", "kind", "callback"])
def test_files_of_a_callback_elsewhere_must_be_of_the_same_run(tmp_path, run, change):
    backup = tmp_path / "backup"
    backup.mkdir()
    mine = callback(backup)
    checkpoint = {"state_dict": {}, "hyper_parameters": {"lr": 0.1}, "callbacks": {}}
    kept = {**checkpoint, "callbacks": {mine.state_key: {"current_score": torch.tensor(0.5)}}}
    if change == "options":
        kept["hyper_parameters"] = {"lr": 0.2}
    elif change == "score":
        kept["callbacks"] = {mine.state_key: {"current_score": torch.tensor(0.25)}}
    elif change == "callback":
        kept["callbacks"] = {}
    torch.save(kept, backup / "best.ckpt")
    if change == "kind":
        (backup / "best.ckpt").write_text("mine")
    state = {"best_k_models": {str(backup / "best.ckpt"): torch.tensor(0.5)}}
    found = own_state(mine, state, checkpoint, run)
    assert list(found["best_k_models"]) == ([str(backup / "best.ckpt")] if change is None else [])
