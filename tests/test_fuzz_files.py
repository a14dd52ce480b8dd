"""Files that are read back, changed in many ways: each is read or refused with an error of ours."""

import importlib
import sys
from pathlib import Path

import pytest

import finetune

BENCHMARKS = Path(finetune.__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def fuzz_files():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("fuzz_files")
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in ("fuzz_files", "damage"):
            sys.modules.pop(name, None)


KINDS = [
    "record",
    "domains",
    "config",
    "metrics",
    "gradients",
    "predictions",
    "calibration",
    "part",
    "checkpoint",
    "onnx",
    "timm",
]
KINDS += ["card", "bundled", "store", "checked", "wandb", "recipe"]


def test_every_kind_is_tried(fuzz_files):
    assert list(fuzz_files.KINDS) == KINDS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_are_read_or_refused(fuzz_files, kind, monkeypatch):
    monkeypatch.setenv("RESNET_FINETUNE_CACHE", "")  # which a kind may set
    found = fuzz_files.fuzz(kind, 60, command=False)
    assert found["faults"] == []
    assert found["accepted"] + found["refused"] == 60
    assert found["accepted"] >= 5  # or healthy files would be refused


def test_what_is_watched_for_is_seen(fuzz_files, monkeypatch):
    monkeypatch.setattr(fuzz_files, "SECONDS", 0.05)

    def busy():
        while True:
            pass

    assert fuzz_files.attempt(busy)[0] == "traceback"
    assert fuzz_files.attempt(lambda: {}["a"])[0] == "traceback"
