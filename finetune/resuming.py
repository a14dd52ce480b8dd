"""Going on with a run: how far a checkpoint came, whether it is the newest, and what may not be different now."""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune import checkpoints
from finetune.errors import CheckpointError, FinetuneError
from finetune.runs import CHECKPOINTS, find_checkpoint, run_of
from finetune.saving import LAST

_FREE = {"workers", "eval_batch_size", "decoded", "reuse_budget"}  # how fast it goes, not what comes out
_MEANING = {  # what a change means beyond itself
    ("max_epochs", "max_steps"): "The schedule of the learning rate, and what is a share of the run, follow the new length.",
    ("monitor", "mode"): "best.ckpt becomes the best of the epochs from here on.",
}
_DRAW = ("split_seed", "val_fraction", "test_fraction", "folds", "fold")


def resolve_checkpoint(what: str | os.PathLike[str], run: Mapping[str, Any], verb: str) -> Path:
    """Find the checkpoint that the option `ckpt_path` means, wherever it was given.

    Args:
        what: A file, a run's folder, or `last`.
        run: The options of the run, of which `folder` and `name` say where `last` is looked for.
        verb: fit goes on from the last checkpoint of a run, others measure the best.

    Raises:
        CheckpointError: If there is none.
    """
    return find_checkpoint(os.fspath(what), Path(run["folder"]), run["name"], prefer="last" if verb == "fit" else "best")


def progress(checkpoint: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many epochs a checkpoint has done, and how many batches of the next one."""
    loops = (checkpoint.get("loops") or {}).get("fit_loop")
    if not loops:
        return int(checkpoint["epoch"]) + 1, 0
    epochs, batches = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]
    within = epochs["started"] > epochs["processed"] and not batches["is_last_batch"]
    return int(epochs["processed"]), int(batches["current"]["processed"]) if within else 0


def progress_text(checkpoint: Mapping[str, Any]) -> str:
    """Return how far a checkpoint came, for people."""
    epochs, batches = progress(checkpoint)
    within = f" and {batches} batch{'es' * (batches != 1)} of the next" if batches else ""
    return f"{epochs} epoch{'s' * (epochs != 1)}{within} {'is' if (epochs, batches) == (1, 0) else 'are'} done"


def warning_of_older(path: Path, checkpoint: Mapping[str, Any]) -> str | None:
    """Return a warning if the run that a checkpoint belongs to has come further than it, or None.

    Args:
        path: The checkpoint's file.
        checkpoint: Its content.
    """
    home = run_of(path)
    last = None if home is None else home / CHECKPOINTS / LAST
    if last is None or not last.is_file() or last.samefile(path):
        return None
    try:
        newest = checkpoints.read(last)
    except CheckpointError:
        return None
    if int(newest["global_step"]) <= int(checkpoint["global_step"]):
        return None
    return (
        f"warning: {path.name} is not the last checkpoint of its run: in {LAST} {progress_text(newest)}. What came after "
        f"{path.name} is trained again, and {LAST} is replaced. To go on from the last: --ckpt_path {home}"
    )


def compare_data(checkpoint: Mapping[str, Any], data: Any) -> str | None:
    """Compare the data options of a checkpoint with those of the run that is to continue it.

    Args:
        checkpoint: What `stamp` and Lightning wrote.
        data: The data module.

    Returns:
        A warning that names what differs, or None.

    Raises:
        CheckpointError: If held-out pictures would be others, so that the run would be measured on pictures it has trained on.
    """
    old: Mapping[str, Any] = checkpoint.get("datamodule_hyper_parameters") or {}
    new = checkpoints.plain(dict(getattr(data, "hparams", {})))
    differ = {key: (old[key], new[key]) for key in old if key in new and old[key] != new[key] and key not in _FREE}
    held = {key: differ.pop(key) for key in _DRAW if key in differ}
    if held and bool(getattr(getattr(data, "folder", None), "drawn", True)):
        raise CheckpointError(
            f"The checkpoint was trained with another draw of the held-out pictures:\n{_lines(held)}\n"
            "The run would be measured on pictures that it has trained on. Leave these options as they were, or start anew."
        )
    if not differ:
        return None
    return f"warning: The run goes on with other data options than its checkpoint:\n{_lines(differ)}"


def compare_run(checkpoint: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return a warning if facts of the run, such as seed, precision or clipping, are not those of the checkpoint, or None.

    Args:
        checkpoint: What `stamp` wrote; older versions wrote fewer facts, and of the others nothing is said.
        now: The same facts of this run, see `checkpoints.run_facts`.
    """
    old = (checkpoint.get(checkpoints.KEY) or {}).get("run") or {}
    differ = {key: (old[key], now[key]) for key in old if key in now and old[key] != now[key]}
    if not differ:
        return None
    meaning = "".join(f"\n  {text}" for keys, text in _MEANING.items() if not differ.keys().isdisjoint(keys))
    return f"warning: The run does not go on exactly as it would have:\n{_lines(differ)}{meaning}"


def restoring(error: BaseException) -> bool:
    """Say whether an exception that is none of ours came while Lightning restored a checkpoint."""
    if isinstance(error, FinetuneError) or not isinstance(error, Exception):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(frame.filename).name == "checkpoint_connector.py" for frame in frames)


def _lines(differ: Mapping[str, tuple[Any, Any]]) -> str:
    return "\n".join(f"  {key}: {old!r} in the checkpoint, {new!r} now" for key, (old, new) in differ.items())
