"""What a callback that keeps checkpoints takes over from a checkpoint: it deletes files by the paths in its state.

A checkpoint may come from anybody, so no path in it is believed. Of each, the last part counts, in the callback's own folder.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from finetune import checkpoints
from finetune.errors import CheckpointError

_VALUES = ("monitor", "best_model_score", "current_score", "kth_value")
_SAME = ("hyper_parameters", "datamodule_hyper_parameters", checkpoints.KEY)


def own_state(callback: ModelCheckpoint, state: Any, checkpoint: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Return the state of a callback with known entries only, whose paths are those of checkpoints in its own folder.

    Args:
        callback: The callback.
        state: Its state in the checkpoint.
        checkpoint: The checkpoint that is resumed.
        run: The run's folder. In it, a file counts if it is a plain one. Elsewhere it must also be of the same run: of the same
            options, and with the same score.
    """
    state = state if isinstance(state, Mapping) else {}
    folder = Path(str(callback.dirpath))
    within = folder.resolve().is_relative_to(run.resolve())

    def own(path: Any, score: Any = None) -> str:
        name = path.replace("\\", "/").rpartition("/")[2] if isinstance(path, str) else ""
        if name in ("", ".", "..") or "\0" in name:
            return ""
        file = folder / name
        try:
            mode = file.lstat().st_mode
        except OSError:  # it is not there, so nothing can happen to it; elsewhere the disk may be back later
            return "" if within else str(file)
        plain = stat.S_ISREG(mode) and file.suffix == callback.FILE_EXTENSION
        return str(file) if plain and (within or _of_same_run(file, checkpoint, callback.state_key, score)) else ""

    ranked = state.get("best_k_models")
    ranked = ranked if isinstance(ranked, Mapping) else {}
    kept = {own(path, score): score for path, score in ranked.items()}
    kept.pop("", None)
    worst = min(kept, key=lambda path: float(kept[path]) * (1 if callback.mode == "max" else -1), default="")
    found = {name: state.get(name) for name in _VALUES}
    found |= {"dirpath": callback.dirpath, "best_k_models": kept, "kth_best_model_path": worst}
    if worst:
        found["kth_value"] = kept[worst]
    found["best_model_path"] = own(state.get("best_model_path"), state.get("best_model_score"))
    found["last_model_path"] = own(state.get("last_model_path"))
    return found


def _of_same_run(file: Path, checkpoint: Mapping[str, Any], key: str, score: Any) -> bool:
    """Return whether a file was written by the run of a checkpoint: nobody else's is deleted or measured."""
    try:
        other = checkpoints.read(file)
        same = all(other.get(name) == checkpoint.get(name) for name in _SAME)
        reached = (other.get("callbacks") or {}).get(key, {}).get("current_score")
        return same and (score is None or (reached is not None and float(reached) == float(score)))
    except (CheckpointError, AttributeError, TypeError, ValueError):
        return False
