"""What `record.json` and `domains.json` in a run's folder may hold, checked when they are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from finetune.schema import convert, read_json

RECORD = "record.json"
DOMAINS = "domains.json"  # of domain adaptation

Count = Annotated[int, Meta(ge=0)]
Epoch = Annotated[int, Meta(ge=0, le=10**9)]
Seconds = Annotated[float, Meta(ge=0, le=10**10)]
CheckpointName = Annotated[
    str, Meta(pattern=r"\A(checkpoints/)?[^/\\]+\.ckpt\Z")
]  # which is sent to W&B: no path leads elsewhere


class _Stage(TypedDict):
    stage: str


class StageEntry(_Stage, total=False):
    """A stage of the network."""

    parameters: Count
    lr: float | None
    trains_from_epoch: Epoch | None


class _Phase(TypedDict):
    start: Epoch
    end: Epoch
    train: list[str]


class PhaseEntry(_Phase, total=False):
    """A freezing phase."""

    norms: bool


class BestEntry(TypedDict):
    """The best checkpoint; `average_of` stands here as well if it is an average."""

    value: float
    epoch: Epoch | None
    checkpoint: CheckpointName


class TargetEntry(TypedDict):
    """The target of domain adaptation."""

    root: str
    counts: dict[str, Count]


class DataEntry(TypedDict, total=False):
    """What is known of the data."""

    root: str | None
    classes: list[str]
    counts: dict[str, list[Count]]
    fingerprint: str | None
    target: TargetEntry


class WeightsEntry(TypedDict, total=False):
    """What was used of the pretrained weights, as far as a report tells it."""

    summary: str
    kept: Count
    missing: list[str]
    head: str


class GitEntry(TypedDict, total=False):
    """The state of the code."""

    commit: str | None
    dirty: bool | None


class Record(TypedDict, total=False):
    """The record of a run, see `finetune.record`; entries of later versions are allowed."""

    state: str
    error: str
    command: list[str]
    resumed: list[dict[str, Any]]
    started: str
    updated: str
    seconds: Seconds
    version: str
    versions: dict[str, str | None]
    git: GitEntry | None
    hardware: str | None
    data: DataEntry | None
    weights: WeightsEntry | None
    stages: list[StageEntry] | None
    phases: list[PhaseEntry] | None
    monitor: str | None
    mode: str | None
    best: BestEntry | None
    test: dict[str, float] | None


class Domains(TypedDict):
    """How far apart a model sees two domains: x, y, the domain and the class of each image."""

    a_distance: float
    points: list[tuple[float, float, str, str]]


def load_record(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the record of a run, with all its entries.

    Args:
        folder: The run's folder.

    Raises:
        CheckpointError: If it is missing or holds something else.
    """
    return _load(Path(folder, RECORD), Record, "the record of a run", finite=False)  # a metric may be NaN


def load_domains(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read `domains.json` of a run, see `load_record`."""
    return _load(Path(folder, DOMAINS), Domains, "the features of two domains")


def _load(path: Path, kind: Any, what: str, finite: bool = True) -> dict[str, Any]:
    advice = "It is damaged: remove or rename it; the run's checkpoints and metrics do not need it."
    found: dict[str, Any] = read_json(path, dict[str, Any], what, advice=advice, finite=finite)
    convert(found, kind, what, where=os.fspath(path), advice=advice, finite=finite)
    return found
