"""resnet-finetune: fine-tune pretrained image backbones on a folder of pictures.

This is the index of the public names. They are imported when they are first used, so that `import finetune` costs nothing and
has no side effects.
"""

import sys

if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].removeprefix("-m") in ("finetune", "finetune.__main__"):
    # `python -m finetune` puts the working folder before Python's library. Nothing is imported from there by its place alone,
    # so this comes before all other imports, which a file in the folder could stand in for.
    import os

    _here = os.getcwd()
    if sys.path[:1] == [_here]:
        del sys.path[0]
        if os.path.dirname(os.path.dirname(os.path.abspath(__file__))) == _here and _here not in sys.path:
            sys.path.append(_here)  # a checkout that is not installed: this package is found nowhere else
            os.environ["PYTHONSAFEPATH"] = ""  # also by the processes that this one starts

import importlib
from typing import TYPE_CHECKING, Any

from finetune.version import __version__

if TYPE_CHECKING:
    from finetune.adapt import AdaptModule as AdaptModule
    from finetune.adapt_data import AdaptDataModule as AdaptDataModule
    from finetune.adaptation import Adaptation as Adaptation
    from finetune.adaptation import DomainBatch as DomainBatch
    from finetune.boundaries import Boundaries as Boundaries
    from finetune.data import FolderDataModule as FolderDataModule
    from finetune.distill import DistillModule as DistillModule
    from finetune.distill_data import DistillDataModule as DistillDataModule
    from finetune.errors import CheckpointError as CheckpointError
    from finetune.errors import ConfigError as ConfigError
    from finetune.errors import DataError as DataError
    from finetune.errors import FinetuneError as FinetuneError
    from finetune.errors import TrainingError as TrainingError
    from finetune.errors import WeightsError as WeightsError
    from finetune.freezing import Phase as Phase
    from finetune.freezing import plan as plan
    from finetune.gradient_flow import GradientFlow as GradientFlow
    from finetune.lr_find import find_lr as find_lr
    from finetune.module import FinetuneModule as FinetuneModule
    from finetune.predictor import Prediction as Prediction
    from finetune.predictor import Predictor as Predictor
    from finetune.record import RunRecord as RunRecord
    from finetune.record import read_record as read_record
    from finetune.stages import Stage as Stage
    from finetune.transforms import InputSpec as InputSpec

_HOME = {
    "AdaptDataModule": "adapt_data",
    "AdaptModule": "adapt",
    "Adaptation": "adaptation",
    "Boundaries": "boundaries",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "DistillDataModule": "distill_data",
    "DistillModule": "distill",
    "DomainBatch": "adaptation",
    "FinetuneError": "errors",
    "FinetuneModule": "module",
    "FolderDataModule": "data",
    "GradientFlow": "gradient_flow",
    "InputSpec": "transforms",
    "Phase": "freezing",
    "Prediction": "predictor",
    "Predictor": "predictor",
    "RunRecord": "record",
    "Stage": "stages",
    "TrainingError": "errors",
    "WeightsError": "errors",
    "find_lr": "lr_find",
    "plan": "freezing",
    "read_record": "record",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'finetune' has no attribute '{name}'")
    return getattr(importlib.import_module(f"finetune.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
