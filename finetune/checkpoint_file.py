"""What a checkpoint file may hold, checked when it is read: the parts that Lightning and this toolkit build on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypedDict

from msgspec import Meta
from torch import Tensor

from finetune.errors import CheckpointError
from finetune.schema import convert
from finetune.transforms import InputSpec
from finetune.weight_files import fault_of

_OF_EACH_VALUE = {"momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}  # in torch and in timm
_NAMED = 3  # tensors that a message names

Count = Annotated[int, Meta(ge=0, le=10**12)]
DottedName = Annotated[str, Meta(pattern=r"\A[^\W\d]\w*(\.[^\W\d]\w*)*\Z")]


class _Done(TypedDict):
    started: Count
    processed: Count


class _Batches(TypedDict):
    current: _Done
    is_last_batch: bool


class _Epochs(TypedDict):
    current: _Done


_FitLoop = TypedDict("_FitLoop", {"epoch_progress": _Epochs, "epoch_loop.batch_progress": _Batches})


class _Loops(TypedDict, total=False):
    fit_loop: _FitLoop


class WeightsOrigin(TypedDict):
    """What was used of the pretrained weights, see `weight_report.Report`."""

    source: str
    location: str | None
    sha256: str | None
    kept: Count
    dropped: list[str]
    missing: list[str]
    reshaped: list[str]
    head: str
    untrained: list[str]


class _LaterWeightsOrigin(WeightsOrigin, total=False):
    input: InputSpec | None
    note: str


class Stamp(TypedDict, total=False):
    """What this toolkit adds to a checkpoint, see `checkpoints.stamp`."""

    format: int
    class_path: DottedName
    class_names: Annotated[list[str], Meta(min_length=1)] | None
    input: InputSpec
    weights: _LaterWeightsOrigin
    run: dict[str, Any]


class _OptimizerState(TypedDict):
    state: dict[int, dict[str, Any]]
    param_groups: list[dict[str, Any]]


class _Checkpoint(TypedDict, total=False):
    epoch: Count
    global_step: Count
    loops: _Loops | None
    hyper_parameters: dict[str, Any] | None
    datamodule_hyper_parameters: dict[str, Any] | None
    optimizer_states: list[_OptimizerState]
    lr_schedulers: list[dict[str, Any]]
    callbacks: dict[str, dict[str, Any]]
    finetune: Stamp | None


def check_content(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Check the parts of a checkpoint that are built on; it may hold more.

    Args:
        checkpoint: What was read.
        path: The file, for the message.

    Raises:
        CheckpointError: If one of them is of another kind.
    """
    name, advice = os.fspath(path), "It is damaged, or was changed by hand: take another checkpoint of the run."
    parts = {key: checkpoint[key] for key in _Checkpoint.__annotations__ if key in checkpoint}
    convert(parts, _Checkpoint, "a checkpoint", where=name, advice=advice, finite=False)
    state = checkpoint.get("state_dict")
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(f"{name} holds no named tensors under 'state_dict'. {advice}")
    for key, tensor in state.items():
        if isinstance(tensor, Tensor) and (fault := fault_of(tensor)):
            raise CheckpointError(f"{name}: '{key}' holds no weights: {fault}. {advice}")


def require_entries(entries: Mapping[str, Any], names: Iterable[str], path: str | os.PathLike[str]) -> None:
    """Make sure that a checkpoint holds what this toolkit writes into each.

    Raises:
        CheckpointError: If something is missing.
    """
    if missing := sorted(set(names) - entries.keys()):
        raise CheckpointError(
            f"{os.fspath(path)} lacks {', '.join(missing)}. It is damaged: take another checkpoint of the run."
        )


def require_optimizer_fits(optimizers: Iterable[Any]) -> None:
    """Compare the averages that optimizers keep with their parameters: a fused update reads past the end of shorter ones.

    Args:
        optimizers: After a checkpoint was restored into them.

    Raises:
        CheckpointError: If one has another shape than its parameter.
    """
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for name in _OF_EACH_VALUE & state.keys():
                found = getattr(state[name], "shape", None)
                if state[name] is not None and found != parameter.shape:
                    raise CheckpointError(
                        f"The optimizer state '{name}' of the checkpoint does not fit its parameter: expected the shape "
                        f"{tuple(parameter.shape)}, found {found if found is None else tuple(found)}. The checkpoint is "
                        "damaged: resume another one of the run."
                    )


def require_fitting(state: Mapping[str, Any], own: Mapping[str, Any], strict: bool = True) -> None:
    """Compare the tensors of a checkpoint with those of the model that it is for.

    Args:
        state: Those of the checkpoint.
        own: Those of the model.
        strict: Whether each must be in both.

    Raises:
        CheckpointError: If one has another shape or kind of number, is missing, or is not known.
    """
    faults = [f"'{name}' is missing" for name in own if name not in state] if strict else []
    faults += [f"'{name}' is not known" for name in state if name not in own] if strict else []
    for name in (name for name in own if name in state):
        mine, theirs = own[name], state[name]
        if not isinstance(mine, Tensor):
            continue
        if not isinstance(theirs, Tensor):
            faults.append(f"'{name}' is no tensor but {type(theirs).__name__}")
        elif mine.shape != theirs.shape:
            faults.append(f"'{name}' has the shape {tuple(theirs.shape)}, expected {tuple(mine.shape)}")
        elif mine.is_floating_point() != theirs.is_floating_point():
            faults.append(f"'{name}' holds {theirs.dtype}, expected {mine.dtype}")
    if faults:
        more = f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise CheckpointError(
            f"The weights of the checkpoint do not fit its model: {'; '.join(faults[:_NAMED])}{more}. Use the code and the "
            "options that it was trained with; a backbone's own weights are given with --model.weights FILE."
        )
