"""Make files that try to run code or to mislead, give each to the command, and print what it did with them.

python benchmarks/hostile.py
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import yaml
from damage import picture
from tabulate import tabulate

from finetune.escaping import shown
from finetune.main import main
from finetune.module import FinetuneModule

HACKED = "hacked"  # a file of this name appears if code was run


class Attack(NamedTuple):
    """A file that tries something, and the words that hand it to the command."""

    file: str
    tries: str
    words: list[str]


class Touch:
    """What writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.path}",)


FIT = ["fit", "--model.backbone", "test_resnet", "--data.workers", "0", "--trainer.fast_dev_run", "true"]


def checkpoint(path: Path, **changes: Any) -> None:
    """Write a checkpoint of the toolkit, with some of its values changed."""
    model = FinetuneModule("test_resnet", num_classes=2, class_names=["a", "b"], weights="none")
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=path.parent)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"] |= changes.pop("options", {})
    content["finetune"] |= changes
    torch.save(content, path)


def attacks(folder: Path) -> Iterator[Attack]:
    """Write hostile files into a folder."""
    touch = Touch(folder / HACKED)
    yield from _pickles(folder, touch)
    yield from _configurations(folder)
    for name, changes in {
        "names_a_class.ckpt": {"class_path": "subprocess.Popen"},
        "names_a_backbone.ckpt": {"options": _unsafe_yaml(folder)},
    }.items():
        checkpoint(folder / name, **changes)
        yield Attack(name, "a checkpoint that names code", ["predict", name, "pictures"])


def _pickles(folder: Path, touch: Touch) -> Iterator[Attack]:
    (folder / "plain.pth").write_bytes(pickle.dumps({"conv1.weight": touch}))
    torch.save({"conv1.weight": touch}, folder / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": {"conv1.weight": touch}}, folder / "new.pth")
    (folder / "new.zip").write_bytes((folder / "new.pth").read_bytes())
    torch.save({"conv1.weight": touch}, folder / "pytorch_model.bin")
    with zipfile.ZipFile(folder / "weights.zip", "w") as archive:
        archive.write(folder / "plain.pth", "weights/data.pkl")
    (folder / "renamed.safetensors").write_bytes((folder / "plain.pth").read_bytes())
    for name in ("plain.pth", "old.pth", "new.pth", "new.zip", "pytorch_model.bin", "weights.zip", "renamed.safetensors"):
        yield Attack(name, "a pickle as weights", [*FIT, "--model.weights", name])
    torch.save({"state_dict": {}, "epoch": 0, "global_step": 0, "finetune": touch}, folder / "run.ckpt")
    yield Attack("run.ckpt", "a pickle as a checkpoint", ["predict", "run.ckpt", "pictures"])
    yield Attack("run.ckpt", "a pickle to go on with", [*FIT, "--config", "small", "--ckpt_path", "run.ckpt"])
    (folder / "export").mkdir()
    (folder / "export" / "config.json").write_text('{"architecture": "test_resnet", "num_classes": 2}')
    torch.save({"conv1.weight": touch}, folder / "export" / "pytorch_model.bin")
    yield Attack("export/pytorch_model.bin", "a pickle as a timm folder", ["predict", "export", "pictures"])
    (folder / "program.pt2").write_bytes((folder / "weights.zip").read_bytes())
    yield Attack("program.pt2", "a pickle as a torch.export archive", ["predict", "program.pt2", "pictures"])


def _unsafe_yaml(folder: Path) -> dict[str, Any]:
    code = f"!!python/object/apply:os.system ['touch {folder / HACKED}']"
    return {"backbone": "yaml.unsafe_load", "backbone_args": {"stream": code}}


def _configurations(folder: Path) -> Iterator[Attack]:
    command = f"touch {folder / HACKED}"
    popen = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(folder / HACKED)]}}
    lambdas = "lightning.pytorch.callbacks.LambdaCallback"
    for name, content in {
        "callback": {"trainer": {"callbacks": [{"class_path": "os.system", "init_args": {"command": command}}]}},
        "hook": {"trainer": {"callbacks": [{"class_path": lambdas, "init_args": {"on_fit_start": "os.abort"}}]}},
        "model": {"model": {"class_path": "subprocess.Popen", "init_args": popen["init_args"]}},
        "argument": {"model": {"init_args": {"backbone_args": {"drop_rate": popen}}}},
        "backbone": {"model": {"init_args": {"backbone": "os.system", "backbone_args": {"command": command}}}},
        "unpickles": {
            "model": {"init_args": {"backbone": "torch.load", "backbone_args": {"f": "old.pth", "weights_only": False}}}
        },
        "loads_yaml": {"model": {"init_args": _unsafe_yaml(folder)}},
        "installed": {"data": {"class_path": "sklearn.utils.Bunch"}},
    }.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
        yield Attack(f"{name}.yaml", "a configuration that names code", ["fit", *FIT[3:], "--config", f"{name}.yaml"])
    (folder / "tagged.yaml").write_text(f"run: !!python/object/apply:os.system ['{command}']\n")
    yield Attack("tagged.yaml", "a YAML tag that calls a function", [*FIT, "--config", "tagged.yaml"])


# ------------------------------------------------------------------------------------------------------- names in data

CLASSES = ["<script>alert(1)</script>", '=HYPERLINK("http://x","y")', "@SUM(1)", "dog"]
NAMES = ["<img src=x onerror=alert(1)>.png", "=1+1.png", "+1.png", "\x1b[2J\x1b]0;owned\x07.png", f"$(touch {HACKED}).png"]
NAMES += [f"`touch {HACKED}`.png", f"a;touch {HACKED};.png", "'; DROP TABLE looks; --.png", "two\nlines.png", "9.png"]


def named_folder(root: Path) -> None:
    """Make a folder whose classes and pictures have names that try something, and an archive in it."""
    for place, label in enumerate(CLASSES):
        for split in ("train", "val"):
            folder = root / split / label.replace("/", "\u2215")
            folder.mkdir(parents=True)
            for number, name in enumerate(NAMES):
                picture(1000 * place + 100 * (split == "val") + number).save(folder / name)
    with zipfile.ZipFile(root / "train" / "dog" / "more.zip", "w") as archive:
        archive.writestr("../../../escaped.png", b"x")


def outcome(words: list[str]) -> tuple[object, str]:
    """Run the command; return its exit code and what it printed."""
    printed = io.StringIO()
    code: object = 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            main(words)
        except SystemExit as end:
            code = end.code
        except Exception as error:
            code = f"TRACEBACK {type(error).__name__}: {error}"
    return code, printed.getvalue()


def _main() -> None:
    rows = []
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        folder = Path(name)
        os.environ["RESNET_FINETUNE_CACHE"] = str(folder / "cache")
        os.chdir(folder)
        (folder / "pictures").mkdir()
        picture(0).save(folder / "pictures" / "0.png")
        for attack in attacks(folder):
            code, said = outcome(attack.words)
            ran = (folder / HACKED).exists()
            (folder / HACKED).unlink(missing_ok=True)
            message = next((line for line in said.splitlines() if line.startswith("error: ")), said[-200:])
            rows.append((attack.file, attack.tries, code, "RAN" if ran else "no", shown(message)[:150]))
            shutil.rmtree(folder / "runs", ignore_errors=True)
        os.chdir(before)
    print(tabulate(rows, ["file", "what it is", "exit code", "code ran", "message"], maxcolwidths=[None, None, None, None, 90]))
    raise SystemExit(int(any(row[3] == "RAN" for row in rows)))


if __name__ == "__main__":
    _main()
