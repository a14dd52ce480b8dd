"""What a checkpoint carries beside Lightning's own content, and how one is read: plain values only, never pickled code."""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint

from finetune.behind import pace_of
from finetune.checkpoint_file import check_content, require_entries, require_fitting
from finetune.errors import CheckpointError, WeightsError, did_you_mean
from finetune.formats import FORMAT, upgrade
from finetune.formats import KEY as KEY
from finetune.randomness import global_seed
from finetune.transforms import InputSpec
from finetune.version import __version__
from finetune.weight_files import read_file
from finetune.weight_report import Report

if TYPE_CHECKING:
    from finetune.module import FinetuneModule

TRAINING_ONLY = "adaptation"  # the part of a module that predicts nothing: the layers of domain adaptation
_STAMPED = ("class_path", "class_names", "input", "weights")
_FREE_TO_CHANGE = {"weights", "partial_weights", "memory_format", "class_names", "compile"}  # a resumed run goes on as it would


def stamp(checkpoint: dict[str, Any], module: FinetuneModule) -> None:
    """Add class names, normalisation, input size and the origin of the weights; make the hyper-parameters plain."""
    checkpoint[KEY] = {
        "format": FORMAT,
        "version": __version__,
        "class_path": f"{type(module).__module__}.{type(module).__qualname__}",
        "class_names": module.class_names,
        "input": plain(asdict(module.input_spec)),
        "weights": module.weights_report.as_dict(),
        "run": run_facts(module._trainer),
        "data": data_facts(module._trainer),
        "split": plain(getattr(getattr(module._trainer, "datamodule", None), "split_facts", {})),
    }
    if module._trainer is not None and module.timetable is not None:
        checkpoint[KEY] |= pace_of(module.timetable, module.trainer, module.place)
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        if key in checkpoint:
            checkpoint[key] = plain(checkpoint[key])


def run_facts(trainer: Any) -> dict[str, Any]:
    """Return what an exact resume depends on beside the options of model and data, as plain values.

    Args:
        trainer: The trainer, or None.
    """
    if trainer is None:
        return {}
    schedule = next((each for each in trainer.callbacks if isinstance(each, GradientAccumulationScheduler)), None)
    stopping = next((each for each in trainer.callbacks if isinstance(each, EarlyStopping)), None)
    best = next((each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint) and each.monitor), None)
    clipped = trainer.gradient_clip_val or None
    facts = {
        "seed": global_seed(),
        "processes": trainer.world_size,
        "accumulate_grad_batches": schedule.scheduling if schedule else trainer.accumulate_grad_batches,
        "precision": trainer.precision,
        "gradient_clip_val": clipped,
        "gradient_clip_algorithm": (trainer.gradient_clip_algorithm or "norm") if clipped else None,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "sync_batchnorm": getattr(trainer.strategy, "_layer_sync", None) is not None,
    }
    if not trainer.fast_dev_run:  # which has limits of its own, and keeps nothing
        limits = ("limit_train_batches", "limit_val_batches", "overfit_batches")
        facts |= {"monitor": best.monitor if best else None, "mode": best.mode if best else None}
        facts |= {"patience": stopping.patience if stopping else None}
        facts |= {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}
        facts |= {name: str(getattr(trainer, name)) for name in limits}  # as text, for 1 is a batch and 1.0 is all of them
    return {name: plain(value) for name, value in facts.items()}


def data_facts(trainer: Any) -> dict[str, Any]:
    """Return what finds the labelled images of a run again when it is over.

    Args:
        trainer: The trainer, or None.

    Returns:
        class: Name of the data module; folder: options of `FolderDataModule` that find its labelled images, None if it has none
        in a folder. Empty without a data module.
    """
    data = getattr(trainer, "datamodule", None)
    if data is None:
        return {}
    options = getattr(data, "folder_options", None)
    return {"class": type(data).__name__, "folder": plain(options()) if callable(options) else None}


def adopt(checkpoint: dict[str, Any], module: FinetuneModule) -> None:
    """Take over what `stamp` wrote, and leave out what only domain adaptation trains with.

    Raises:
        CheckpointError: If the checkpoint is of a newer format, has other classes than the data, or contradicts the options of
            the run that it is to continue.
    """
    stamped = upgrade(checkpoint).get(KEY)
    if stamped is None:
        return
    check_content(checkpoint, "The checkpoint")
    require_entries(stamped, _STAMPED, "The checkpoint")
    if TRAINING_ONLY not in dict(module.named_children()):
        state = checkpoint["state_dict"]
        for name in [name for name in state if name.startswith(f"{TRAINING_ONLY}.")]:
            del state[name]
    require_fitting(checkpoint["state_dict"], module.state_dict(), strict=module.strict_loading)
    refuse_other_classes(checkpoint, module)
    names, mine = stamped["class_names"], module.class_names
    trainer = module._trainer
    if trainer is not None and trainer.state.fn == "fit":
        refuse_other_options(checkpoint.get("hyper_parameters", {}), module.hparams)
    if names and len(names) != module.hparams["num_classes"]:
        raise CheckpointError(
            f"The checkpoint names {len(names)} classes and has {module.hparams['num_classes']}. It is damaged."
        )
    module.class_names = names or mine
    module.weights_report = Report.from_dict(stamped["weights"])
    spec = stamped_input(checkpoint)
    predicts = trainer is not None and trainer.state.fn == "predict"  # loaders are made later, and ask for this input
    if not predicts and getattr(getattr(trainer, "datamodule", None), "input_spec", None) is not None:  # how pictures come in
        spec = replace(module.input_spec, mean=spec.mean, std=spec.std)
    module.expect(spec)


def stamped_input(checkpoint: Mapping[str, Any]) -> InputSpec:
    """Return the input that a checkpoint of a `FinetuneModule` was trained with."""
    return InputSpec.from_plain(checkpoint[KEY]["input"])


def refuse_other_classes(checkpoint: Mapping[str, Any], module: FinetuneModule) -> None:
    """Compare the classes of a checkpoint with those of the data.

    Raises:
        CheckpointError: If they differ.
    """
    names, mine = (checkpoint.get(KEY) or {}).get("class_names"), module.class_names
    if names and mine and list(names) != list(mine):
        raise CheckpointError(
            f"The checkpoint was trained on {len(names)} classes ({_shorten(names)}), the data has {len(mine)} "
            f"({_shorten(mine)}). Use the data it was trained on, or start a new run from it with --model.weights CHECKPOINT."
        )


def refuse_other_options(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Compare the model options of a checkpoint with those of the run that is to continue it.

    Raises:
        CheckpointError: If they differ; the message names both values.
    """
    new = plain(dict(new))
    differ = [key for key in old if key in new and old[key] != new[key] and key not in _FREE_TO_CHANGE]
    if differ:
        lines = "\n".join(f"  {key}: {old[key]!r} in the checkpoint, {new[key]!r} now" for key in differ)
        raise CheckpointError(
            f"A resumed run continues with the model options of its checkpoint, but these differ:\n{lines}\n"
            "Leave them as they were, or start a new run from the trained weights with --model.weights CHECKPOINT."
        )


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a Lightning checkpoint without running pickled code.

    Raises:
        CheckpointError: If it is missing, damaged, no checkpoint, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.ckpt")] if path.parent.is_dir() else []
        raise CheckpointError(f"There is no checkpoint {path}.{did_you_mean(path.name, siblings)}")
    try:
        checkpoint = read_file(path)
    except WeightsError as error:
        raise CheckpointError(str(error)) from error
    if "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} is no checkpoint: it lacks the entry 'state_dict'.")
    checkpoint = upgrade(checkpoint)
    check_content(checkpoint, path)
    return checkpoint


def read_own(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint of a `FinetuneModule`, see `read`.

    Raises:
        CheckpointError: Also if another module wrote it.
    """
    checkpoint = read(path)
    require_own(checkpoint, path)
    require_entries(checkpoint, ("epoch", "global_step"), path)
    return checkpoint


def require_own(checkpoint: Mapping[str, Any], name: str | os.PathLike[str]) -> None:
    """Make sure that a `FinetuneModule` wrote a checkpoint.

    Raises:
        CheckpointError: If another module did.
    """
    if checkpoint.get(KEY) is None:
        raise CheckpointError(
            f"{name} was not written by a FinetuneModule: it lacks the entry '{KEY}' with class names and input size. Where it "
            "holds the weights of a backbone, start from them with --model.weights FILE."
        )
    require_entries(checkpoint[KEY], _STAMPED, name)


def plain(value: Any) -> Any:
    """Turn a value into one that loads with `weights_only=True`: str, numbers, bool, None, lists and dicts of them.

    >>> plain({"path": Path("a"), "pair": (1, 2.0)})
    {'path': 'a', 'pair': [1, 2.0]}
    """
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch scalars and arrays
        return plain(value.tolist())
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
