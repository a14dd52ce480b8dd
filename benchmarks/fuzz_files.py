"""Change every kind of file that is read back in thousands of ways, give each to its reader, and print what came of it.

python benchmarks/fuzz_files.py              at least 2,000 mutations of each kind, each kind in a process of its own
python benchmarks/fuzz_files.py --quick      60 of each kind (or --number), in this process, without the command
python benchmarks/fuzz_files.py record onnx  only these kinds

A mutation is accepted (the reader returns something), or refused with an error of `finetune.errors`. Anything else counts as a
traceback; so does one that takes more than 5 s of CPU, or more than 1.5 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import io
import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import safetensors.torch
import torch
import yaml
from damage import picture
from tabulate import tabulate

from finetune import bundled_weights, checkpoints
from finetune.arguments import _require_options, option_of
from finetune.calibration import calibration_file, store_temperature, stored_temperature
from finetune.card import KEY as CARD_KEY
from finetune.card import describe, input_on, read_card, write_weights
from finetune.domain_figures import feature_map
from finetune.errors import FinetuneError
from finetune.examine import Examined
from finetune.examined import Memory
from finetune.main import main
from finetune.module import FinetuneModule
from finetune.outcomes import Outcome, read_outcome, write_outcome
from finetune.page import value_text
from finetune.report import content as report_content
from finetune.resuming import compare_data, compare_run, progress_text
from finetune.rows import GrowingFile
from finetune.run_files import RunFiles, flat
from finetune.store import kept_table
from finetune.trained import ONNX_KEY, facts, open_trained
from finetune.wandb_tracking import _read_identity

SECONDS, MEGABYTES = 5, 1536
_WAIT = 120  # seconds of wall clock: for a reader that sleeps
_SAMPLE = 10  # of all mutations that are also given to the command

Mutated = tuple[Any, ...]


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
        write: Writes a mutation, drawn from a generator of random numbers, into a folder that holds a healthy file.
        read: Reads it as the package does.
        command: Does something with it as a user would; None if no command reads it.
    """

    write: Callable[[random.Random, Path], None]
    read: Callable[[Path], Any]
    command: Callable[[Path], None] | None = None


# ---------------------------------------------------------------------------------------------------------- mutations

ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 2**31, -(2**63), 2**64, 10**30, 10**400, 0.5, -0.5, 1e-320, 1e308, -1e308),
    *(float("nan"), float("inf"), -float("inf"), "", "x", "nan", "0", "1e999", "a" * 5000, "\0", "\ud800", "\u202e", "\x1b[2J"),
    *("=1+1", "../../x", "/etc/passwd", "~nobody/x", "C:\\x", "a\nb", "é", "[]", "{}", "null", "'", '"', [], {}, [[]], [None]),
    *([1, 2, 3], ["a", "a"], [{}], {"": 1}, {"a": {"b": []}}, [0.1] * 3, [0.0] * 3, {"0": 0}, list(range(300))),
]


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value within plain values."""
    yield here
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*here, key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from places(inner, (*here, index))


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value] if depth % 2 else {"a": value}
    return value


def mutate(value: Any, rng: random.Random) -> Any:
    """Change plain values in one place or a few."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        path = rng.choice(list(places(value)))
        if not path:
            if rng.random() < 0.05:
                value = copy.deepcopy(rng.choice(ODD))
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        if isinstance(holder, tuple):
            continue
        _change(holder, path[-1], rng)
    return value


def _change(holder: Any, key: Any, rng: random.Random) -> None:
    kind, old = rng.randrange(9), holder[key]
    if kind == 0:
        del holder[key]
    elif kind == 1:
        holder[key] = {"a": old} if rng.random() < 0.5 else [old]
    elif kind == 2:
        holder[key] = str(old)
    elif kind == 3 and isinstance(old, int | float) and not isinstance(old, bool) and abs(old) < 1e300:
        holder[key] = old * rng.choice([-1, 0, 1e9, 10**9, 1e300, 0.5])
    elif kind == 4 and isinstance(holder, dict):
        name = rng.choice([f"{key}_", "", "\0", "é" * 9, 0, "__class__", "class_path"])
        holder[name] = holder.pop(key)
    elif kind == 5 and isinstance(old, list):
        holder[key] = old * rng.choice([2, 3, 50]) if rng.random() < 0.5 else old[: len(old) // 2]
    elif kind == 6 and isinstance(old, dict):
        holder[key] = list(old.items()) if rng.random() < 0.5 else {**old, "later": 1}
    elif kind == 7:
        holder[key] = nested(rng.choice([5, 60, 70, 150]))
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD))


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Change the bytes of a file."""
    kind, place = rng.randrange(11), rng.randrange(len(data) + 1)
    changed = bytearray(data)
    if kind <= 1:
        return data[:place]
    if kind <= 4 and data:
        for _ in range(rng.choice([1, 1, 8, 64])):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    inserted = {5: b"\0", 6: b"\xff\xfe", 7: b"[" * 3000, 8: b"{" * 200, 9: data[place:][:200]}.get(kind, b"9" * 5000)
    if kind == 6 and rng.random() < 0.3:
        return b"\xef\xbb\xbf" + data
    return data[:place] + inserted + data[place:]


def _write_json(path: Path, value: Any, rng: random.Random) -> None:
    path.write_bytes(_json(value, rng))


def _json(value: Any, rng: random.Random) -> bytes:
    """Return a mutation as JSON: of the values in most cases, otherwise of the bytes."""
    if rng.random() < 0.75:
        value = mutate(value, rng)
    data = json.dumps(value, default=str, skipkeys=True).encode("utf-8", "surrogatepass")
    return damaged(data, rng) if rng.random() < 0.3 else data


_YAML_ODD = [b"a: &a\n  b: *a\n", b"&x [*x]\n", b"k: *nowhere\n", b"trainer: 5\ntrainer: 6\n", b"? {a: 1}\n: 2\n"]
_YAML_ODD += [b"d: 2026-99-99\n", b"d: 1:2:3:4\n", b"d: !!binary x\n", b"d: !!python/name:os.system\n", b"d: 0x" + b"f" * 9000]


def _yaml(value: Any, rng: random.Random) -> bytes:
    if rng.random() < 0.6:
        value = mutate(value, rng)
    data = yaml.safe_dump(value, sort_keys=False).encode("utf-8", "surrogatepass")
    kind = rng.randrange(12)
    if kind == 0:
        data += rng.choice(_YAML_ODD)
    elif kind == 1:
        lines = (b"b%d: &b%d [%s]\n" % (i + 1, i + 1, b", ".join([b"*b%d" % i] * 9)) for i in range(9))
        data += b"b0: &b0 [x, x]\n" + b"".join(lines)
    elif kind <= 5:
        data = damaged(data, rng)
    return data


def _rows(rows: list[list[str]], rng: random.Random) -> bytes:
    rows = copy.deepcopy(rows)
    for _ in range(rng.choice([1, 1, 2, 5])):
        row = rng.choice(rows)
        kind = rng.randrange(7)
        if kind == 0 and row:
            del row[rng.randrange(len(row))]
        elif kind == 1:
            row.insert(rng.randrange(len(row) + 1), str(rng.choice(ODD)))
        elif kind == 2:
            rows.remove(row)
            rows = rows or [[]]
        elif kind == 3:
            rows.append(list(row))
        elif row:
            row[rng.randrange(len(row))] = str(rng.choice(ODD))
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    data = text.getvalue().encode("utf-8", "surrogateescape" if "\udc80" in text.getvalue() else "surrogatepass")
    if rng.random() < 0.05:
        data += b'"' + b"x" * 200_000 + b'"\n'
    return damaged(data, rng) if rng.random() < 0.3 else data


# ------------------------------------------------------------------------------------------------------ healthy files

CLASSES = ["ants", "bees"]
INPUT = {"size": 32, "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "crop": 0.875}
RECORD: dict[str, Any] = {
    "format": 1,
    "state": "finished",
    "command": ["resnet-finetune", "fit", "--config", "small"],
    "resumed": [{"command": ["fit"], "started": "2026-01-31T00:00:00+00:00"}],
    "started": "2026-01-31T00:00:00+00:00",
    "updated": "2026-01-31T00:00:00+00:00",
    "seconds": 75.0,
    "version": "0.1.0",
    "versions": {"torch": "2.9"},
    "git": {"commit": "abc123", "dirty": True},
    "hardware": "cpu, 2 cores",
    "data": {
        "root": "photos",
        "classes": CLASSES,
        "counts": {"train": [40, 40], "val": [3, 3]},
        "fingerprint": "beef",
        "target": {"root": "others", "counts": {"train": 3}},
    },
    "weights": {"source": "bundled", "kept": 60, "missing": ["x"], "head": "new", "summary": "bundled resnet18"},
    "stages": [{"stage": name, "parameters": 1000, "lr": 0.1, "trains_from_epoch": 0} for name in ("stem", "layer1", "head")],
    "phases": [
        {"start": 0, "end": 2, "train": ["head"], "norms": False},
        {"start": 2, "end": 10000, "train": ["stem", "layer1", "head"], "norms": True},
    ],
    "monitor": "val/acc",
    "mode": "max",
    "best": {"value": 0.8, "epoch": 2, "checkpoint": "checkpoints/best.ckpt"},
    "test": {"test/acc": 0.65},
}
CONFIG: dict[str, Any] = {
    "seed_everything": 0,
    "trainer": {"max_epochs": 4, "precision": "32-true"},
    "model": {
        "class_path": "finetune.FinetuneModule",
        "init_args": {"backbone": "resnet18", "lr": 0.01, "lr_scale": {"stem": 0.1}},
    },
    "data": {"class_path": "finetune.FolderDataModule", "init_args": {"root": "photos", "augment": "light"}},
    "run": {"monitor": "val/acc", "mode": None, "name": "small", "folder": "runs"},
}
METRICS = [["epoch", "step", "lr/stem", "lr/head", "train/loss", "val/acc", "val/loss"]]
METRICS += [["", str(step), "0.001", "0.01", "", "", ""] for step in range(0, 40, 5)]
METRICS += [[str(epoch), str(10 * epoch + 9), "", "", "1.5", "0.5", "0.7"] for epoch in range(4)]
GRADIENTS = [["step", "stage", "grad_norm", "update_ratio", "distance", "nonfinite"]]
GRADIENTS += [
    [str(step), stage, "0.1", "0.001", "0.5", "0"] for step in range(0, 40, 10) for stage in ("stem", "layer1", "head")
]


def _run(folder: Path) -> None:
    """Write the files of a run."""
    (folder / "record.json").write_text(json.dumps(RECORD))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    for name, rows in (("metrics.csv", METRICS), ("gradients.csv", GRADIENTS)):
        (folder / name).write_text("".join(",".join(row) + "\n" for row in rows))


def _outcome() -> Outcome:
    values = np.random.default_rng(0).dirichlet([1, 1], 12)
    return Outcome([f"val/{n}.png" for n in range(12)], np.arange(12) % 2, values, tuple(CLASSES))


def _module() -> FinetuneModule:
    return FinetuneModule("test_resnet", num_classes=2, class_names=CLASSES, weights="none")


def _checkpoint(path: Path) -> None:
    """Write a checkpoint with all that a training leaves in one, without training."""
    model = _module()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=path.parent, max_epochs=1)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    content["optimizer_states"], content["lr_schedulers"] = [optimizer.state_dict()], [{"last_epoch": 3, "base_lrs": [0.1]}]
    content["callbacks"] = {"LastCheckpoint": {"row": {"step": 3, "epoch": 0, "val/acc": 0.5}}, "EMA": {"decay": 0.99}}
    content["datamodule_hyper_parameters"] = {"root": "photos", "batch_size": 4, "workers": 0, "split_seed": 0}
    torch.save(content, path)


# -------------------------------------------------------------------------------------------------------------- kinds


def _look(folder: Path) -> None:
    """Ask all that reports ask of the files of a run."""
    files = RunFiles(folder)
    files.at_best()
    for name in ("spans", "rates", "stages", "epochs_done", "best_epoch", "data_root", "outcomes", "gradients", "monitor"):
        getattr(files, name)
    [value_text(value) for _, value in flat(files.config)]
    report_parts(files)
    if files.unreadable:
        raise FinetuneError(next(iter(files.unreadable.values())))


def report_parts(files: RunFiles) -> None:
    """Make all of a report but its figures."""
    from finetune import report

    for part in (report._numbers, report._facts, report._stages, report._phases, report._commands, report._versions):
        list(part(files))
    report._headline(files), report._lead(files), report._metric_rows(files)
    if files.domains:
        assert files.domains["points"] is not None


def _report(folder: Path) -> None:
    """Make all of a report, with its figures."""
    report_content(RunFiles(folder))
    if domains := RunFiles(folder).domains:
        feature_map(domains)


def _fit(words: list[str]) -> None:
    tiny = ["--model.backbone", "test_resnet", "--model.weights", "none", "--data.image_size", "32", "--data.workers", "0"]
    main(["fit", *words, *tiny, "--trainer.fast_dev_run", "true", "--data.reuse", "off", "--model.head_init", "default"])


def _changed(name: str, value: Any) -> Callable[[random.Random, Path], None]:
    return lambda rng, folder: _write_json(folder / name, value, rng)


def _table(name: str, rows: list[list[str]]) -> Callable[[random.Random, Path], None]:
    return lambda rng, folder: (folder / name).write_bytes(_rows(rows, rng)) and None


def _write_checkpoint(rng: random.Random, folder: Path) -> None:
    """Change values and tensors of a checkpoint and save it again, or change the bytes of its file."""
    path = folder / "mutated.ckpt"
    if rng.random() < 0.2:
        path.write_bytes(damaged((folder / "whole.ckpt").read_bytes(), rng))
        return
    content = torch.load(folder / "whole.ckpt", weights_only=True)
    state = content.pop("state_dict")
    if rng.random() < 0.7:
        content = mutate(content, rng)
    else:
        name = rng.choice(list(state))
        state[name] = rng.choice(_TENSORS)(state[name])
    if isinstance(content, dict):
        content["state_dict"] = rng.choice([None, [], {}, {"a": 1}, {1: state}]) if rng.random() < 0.03 else state
    with contextlib.suppress(UnicodeEncodeError):  # pickle writes no text with half a character
        torch.save(content, path)


_TENSORS: list[Callable[[Any], Any]] = [
    lambda t: torch.empty_like(t, device="meta"),
    lambda t: t.double(),
    lambda t: t.to(torch.int8),
    lambda t: t.to(torch.complex64),
    lambda t: t[None],
    lambda t: t.flatten()[:1],
    lambda t: torch.empty(0),
    lambda t: t.to_sparse() if t.dim() else t,
    lambda t: t.expand(1000, *t.shape),
    lambda t: None,
    lambda t: "x",
    lambda t: [1.0],
    lambda t: torch.full_like(t, 1e30) if t.is_floating_point() else t - 9,
    lambda t: t.bool(),
]


def _read_checkpoint(folder: Path) -> None:
    """Do what `predict` and a resumed run do with a checkpoint before anything is computed."""
    path = folder / "mutated.ckpt"
    inside = checkpoints.read(path)
    if {"global_step", "epoch"} <= inside.keys():
        progress_text(inside)
    compare_data(inside, object())
    compare_run(inside, {"seed": 0})
    trained = open_trained(path, "cpu")
    trained.probabilities(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def _predict(name: str) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        picture(0).save(folder / "0.png")
        with contextlib.suppress(FileNotFoundError):
            (folder / "out.csv").unlink()
        main(["predict", str(folder / name), str(folder / "0.png"), "--out", str(folder / "out.csv"), "--workers", "0"])

    return run


def _resume(folder: Path) -> None:
    _fit(["--config", "small", "--ckpt_path", str(folder / "mutated.ckpt"), "--data.root", "digits", "--data.limit", "4"])


def _onnx(folder: Path) -> Path:
    """Return a tiny ONNX model with our input and output."""
    import onnx
    from onnx import TensorProto, helper

    path = folder / "healthy.onnx"
    if not path.exists():
        images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 3, 32, 32])
        output = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 2])
        nodes = [
            helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=0),
            helper.make_node("Gemm", ["y", "w"], ["z"]),
            helper.make_node("Softmax", ["z"], ["probabilities"]),
        ]
        axes = helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])
        weight = helper.make_tensor("w", TensorProto.FLOAT, [3, 2], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
        graph = helper.make_graph(nodes, "g", [images], [output], [axes, weight])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.save(model, path)
    return path


def _write_onnx(rng: random.Random, folder: Path) -> None:
    import onnx

    model = onnx.load(_onnx(folder))
    own = {"classes": CLASSES, "input": INPUT, "temperature": 1.0}
    if rng.random() < 0.9:
        key = ONNX_KEY if rng.random() < 0.97 else "other"
        model.metadata_props.add(key=key, value=_json(own, rng).decode("utf-8", "replace"))
    path = folder / "mutated.onnx"
    onnx.save(model, path)
    if rng.random() < 0.1:
        path.write_bytes(damaged(path.read_bytes(), rng))


def _read_export(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        trained = open_trained(folder / name, "cpu")
        facts(trained)
        size = trained.input_spec.size
        if size == 32:
            trained.probabilities(torch.zeros(1, 3, size, size, dtype=torch.uint8))

    return read


def _write_timm(rng: random.Random, folder: Path) -> None:
    model = folder / "model"
    if not model.exists():
        import timm.models

        timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=2), model, safe_serialization=True)
        config = json.loads((model / "config.json").read_text())
        config |= {
            "label_names": CLASSES,
            "resnet_finetune": {"input": INPUT, "temperature": 1.0},
            "model_args": {"drop_rate": 0.1},
        }
        (folder / "healthy.json").write_text(json.dumps(config))
    _write_json(model / "config.json", json.loads((folder / "healthy.json").read_text()), rng)


def _write_card(rng: random.Random, folder: Path) -> None:
    card = {"teacher": {"name": "resnet50", "sha256": "ab"}, "input": INPUT, "licence": "Apache-2.0"}
    path = folder / "w.safetensors"
    if rng.random() < 0.8:
        text = _json(card, rng).decode("utf-8", "replace")
        safetensors.torch.save_file({"conv1.weight": torch.zeros(2)}, path, {CARD_KEY: text})
    else:
        write_weights(path, {"conv1.weight": torch.zeros(2)}, card, torch.float32)
        path.write_bytes(damaged(path.read_bytes(), rng))


def _read_card(folder: Path) -> None:
    card = read_card(folder / "w.safetensors")
    describe(card)
    input_on(card, folder / "w.safetensors")


def _read_bundled(folder: Path) -> None:
    before, bundled_weights.FOLDER = bundled_weights.FOLDER, folder
    try:
        bundled_weights.bundled_card("net")
        with contextlib.suppress(FinetuneError):  # the sha256 is that of no file
            bundled_weights.bundled_file("net")
    finally:
        bundled_weights.FOLDER = before


def _write_calibration(rng: random.Random, folder: Path) -> None:
    path = store_temperature(folder / "best.ckpt", 1.5, 30, {"split": "val", "pictures": 6})
    _write_json(path, json.loads(path.read_text()), rng)


def _write_part(rng: random.Random, folder: Path) -> None:
    for path in folder.glob("table.csv*"):
        path.unlink()
    table = GrowingFile(folder / "table.csv", {"model": "a.ckpt", "topk": 1})
    table.append(b"file,label\n0.png,a\n", 1, "0.png")
    table.close()
    state = folder / "table.csv.part.json"
    _write_json(state, json.loads(state.read_text()), rng)


def _read_part(folder: Path) -> None:
    table = GrowingFile(folder / "table.csv", {"model": "a.ckpt", "topk": 1})
    table.append(b"1.png,a\n", 1, "1.png")
    table.close()


def _write_memory(rng: random.Random, folder: Path) -> None:
    """Change a row of the database of checked images, or its bytes."""
    os.environ["RESNET_FINETUNE_CACHE"] = str(folder / "cache")
    root = folder / "photos"
    root.mkdir(exist_ok=True)
    (root / "0.png").write_bytes(b"x")
    with Memory(root) as memory:
        path = memory.path
    path.unlink(missing_ok=True)
    with Memory(root) as memory:
        memory.keep(root, "0.png", True, Examined("truncated", "at byte 3", (("grey", ""),), b"1234"))
    if rng.random() < 0.4:
        path.write_bytes(damaged(path.read_bytes(), rng))
        return
    with contextlib.closing(sqlite3.connect(path)) as base:
        said = _json(["truncated", "at byte 3", [["grey", ""]]], rng)
        values = [said.decode("utf-8", "replace"), said, *[each for each in ODD if isinstance(each, str | float | None)]]
        column = rng.choice(["said", "said", "said", "state", "full", "digest"])
        with contextlib.suppress(UnicodeEncodeError, OverflowError):
            base.execute(f"UPDATE looks SET {column} = ?", (rng.choice(values[:2] if column == "said" else values),))
        base.commit()


def _read_memory(folder: Path) -> None:
    with Memory(folder / "photos") as memory:
        found = memory.recall(folder / "photos", "0.png", True)
        if found is None:
            memory.keep(folder / "photos", "0.png", True, Examined())


def _write_store(rng: random.Random, folder: Path) -> None:
    os.environ["RESNET_FINETUNE_CACHE"] = str(folder / "cache")
    store = folder / "cache" / "kept" / "0123"
    store.mkdir(parents=True, exist_ok=True)
    _write_json(store / "about.json", {"what": "stages to layer3", "pictures": "a folder", "shape": [100, 64, 4, 4]}, rng)


def _read_options(folder: Path) -> None:
    path = folder / "recipe.yaml"
    option_of([path], "run", "name")
    option_of([path], "model", "init_args", "backbone")
    _require_options(path)


DOMAINS = {"a_distance": 1.25, "points": [[0.1, 0.2, domain, name] for domain in ("source", "target") for name in CLASSES]}
IDENTITY = {"id": "abc12345", "project": "p", "entity": None, "url": "https://example.org"}
KINDS: dict[str, Kind] = {
    "record": Kind(_changed("record.json", RECORD), _look, _report),
    "domains": Kind(_changed("domains.json", DOMAINS), _look, _report),
    "config": Kind(lambda rng, folder: (folder / "config.yaml").write_bytes(_yaml(CONFIG, rng)) and None, _look, _report),
    "metrics": Kind(_table("metrics.csv", METRICS), _look, _report),
    "gradients": Kind(_table("gradients.csv", GRADIENTS), _look, _report),
    "predictions": Kind(
        lambda rng, folder: (folder / "predictions.val.csv").write_bytes(_rows(_prediction_rows(), rng)) and None,
        lambda folder: (read_outcome(folder / "predictions.val.csv"), _look(folder)),
        _report,
    ),
    "calibration": Kind(_write_calibration, lambda folder: stored_temperature(folder / "best.ckpt", 30)),
    "part": Kind(_write_part, _read_part),
    "checkpoint": Kind(_write_checkpoint, _read_checkpoint, _predict("mutated.ckpt")),
    "onnx": Kind(_write_onnx, _read_export("mutated.onnx"), _predict("mutated.onnx")),
    "timm": Kind(_write_timm, _read_export("model"), _predict("model")),
    "card": Kind(_write_card, _read_card),
    "bundled": Kind(_changed("net.json", {"sha256": "ab", "licence": "Apache-2.0", "input": INPUT}), _read_bundled),
    "store": Kind(_write_store, lambda folder: kept_table(), lambda folder: main(["reuse"])),
    "checked": Kind(_write_memory, _read_memory),
    "wandb": Kind(_changed("wandb.json", IDENTITY), _read_identity),
    "recipe": Kind(
        lambda rng, folder: (folder / "recipe.yaml").write_bytes(_yaml({**CONFIG, "data": {}}, rng)) and None,
        _read_options,
        lambda folder: _fit(["--config", str(folder / "recipe.yaml"), "--data.root", "digits"]),
    ),
}


def _prediction_rows() -> list[list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        write_outcome(_outcome(), Path(folder, "p.csv"))
        return list(csv.reader(Path(folder, "p.csv").read_text().splitlines()))


# -------------------------------------------------------------------------------------------------------------- watch


class TooLongError(BaseException):
    """A reader took more than 5 s; nothing in the package catches it."""


def _too_long(*_: object) -> None:
    raise TooLongError


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Limit CPU time and wall clock of what is done."""
    for number, timer, seconds in ((signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, _WAIT)):
        signal.signal(number, _too_long)
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)


def attempt(action: Callable[[], Any]) -> tuple[str, str, float]:
    """Do something; return accepted, refused or traceback, the reason, and the seconds of CPU that it took."""
    start = time.process_time()
    found, reason = "accepted", ""
    try:
        with (
            watched(),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            action()
    except FinetuneError as error:
        found, reason = "refused", str(error)
    except SystemExit as stop:
        found = "accepted" if stop.code in (0, None) else "refused"
    except (Exception, TooLongError):
        found, reason = "traceback", traceback.format_exc(limit=-4)
    return found, reason, time.process_time() - start


def fuzz(name: str, number: int, seed: int = 0, command: bool = True) -> dict[str, Any]:
    """Try mutations of one kind; return a row of the table, and the tracebacks.

    Args:
        name: The kind.
        number: How many mutations.
        seed: Another seed draws others.
        command: Give some of them to the command as well.
    """
    kind, rng = KINDS[name], random.Random(f"{seed} {name}")
    counts: Counter[str] = Counter()
    faults: list[str] = []
    slowest = 0.0
    with tempfile.TemporaryDirectory() as place, _chdir(place):
        folder = Path(place)
        if name in ("record", "domains", "config", "metrics", "gradients", "predictions"):
            _run(folder)
            if name == "predictions":  # elsewhere its metrics would take most of the time
                write_outcome(_outcome(), folder / "predictions.val.csv")
        elif name == "checkpoint":
            _checkpoint(folder / "whole.ckpt")
        elif name == "calibration":
            calibration_file(folder / "best.ckpt").touch()
        for index in range(number):
            kind.write(rng, folder)
            actions: list[Callable[[Path], Any]] = [kind.read]
            if command and kind.command is not None and index % max(1, number // _SAMPLE) == 0:
                actions.append(kind.command)
            for action in actions:
                found, reason, took = attempt(lambda action=action: action(folder))  # type: ignore[misc]
                if found == "traceback":
                    faults.append(f"{name} {index}: {reason}")
                counts[found if action is kind.read else f"command {found}"] += 1
                slowest = max(slowest, took)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "kind": name,
        "mutations": number,
        **{what: counts[what] for what in ("accepted", "refused", "traceback")},
        "by command": counts["command accepted"] + counts["command refused"] + counts["command traceback"],
        "its tracebacks": counts["command traceback"],
        "slowest, s": round(slowest, 2),
        "peak, MB": round(peak),
        "faults": faults,
    }


@contextlib.contextmanager
def _chdir(place: str) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


def in_a_process(name: str, number: int, seed: int) -> dict[str, Any]:
    """Do `fuzz` in a process that may take 1.5 GB."""
    words = [sys.executable, __file__, name, "--number", str(number), "--seed", str(seed), "--here"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (MEGABYTES * 2**20, MEGABYTES * 2**20))

    done = subprocess.run(words, capture_output=True, text=True, preexec_fn=limit, check=False)
    if done.returncode:
        return {"kind": name, "faults": [f"{name}: the process ended with {done.returncode}\n{done.stderr[-2000:]}"]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run() -> int:
    """Print the table; return 1 if there was a traceback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--number", type=int, help="mutations of each kind (default: 2000; with --quick 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few, in this process, without the command")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    kinds, number = options.kinds or list(KINDS), options.number or (60 if options.quick else 2000)
    if options.here:
        print(json.dumps(fuzz(kinds[0], number, options.seed)))
        return 0
    rows = []
    for name in kinds:
        row = fuzz(name, number, options.seed, command=False) if options.quick else in_a_process(name, number, options.seed)
        rows.append(row)
        faults = row.pop("faults")
        for fault in list({fault.rpartition("\n\n")[2][-800:]: fault for fault in faults}.values())[:5]:
            print(fault, file=sys.stderr)
        print(f"{name}: {len(faults)} faults", file=sys.stderr, flush=True)
    print(tabulate(rows, headers="keys"))
    return int(any(row.get("traceback", 1) or row.get("its tracebacks") for row in rows))


if __name__ == "__main__":
    sys.exit(run())
