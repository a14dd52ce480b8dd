"""The help of `fit`, `validate`, `test`, `distill` and `adapt`."""

from __future__ import annotations

import inspect
from typing import Any

import lightning as L
from jsonargparse import ArgumentParser

from finetune.adapt import AdaptModule
from finetune.adapt_data import AdaptDataModule
from finetune.data import FolderDataModule
from finetune.defaults import RunOptions, trainer_defaults
from finetune.distill import DistillModule
from finetune.distill_data import DistillDataModule
from finetune.module import FinetuneModule

_CLASSES: dict[str, tuple[Any, Any, str]] = {
    "distill": (DistillModule, DistillDataModule, "--data.pictures FOLDER"),
    "adapt": (AdaptModule, AdaptDataModule, "--data.root SOURCE --data.target TARGET"),
}


def help_text(verb: str) -> str:
    """Return the options that matter, with what they mean; Lightning's own help hides those of model and data.

    Args:
        verb: `fit`, `validate`, `test`, `distill` or `adapt`.
    """
    model, data, first = _CLASSES.get(verb, (FinetuneModule, FolderDataModule, "--data.root FOLDER"))
    parser = ArgumentParser(
        prog=f"resnet-finetune {verb}",
        usage=f"resnet-finetune {verb} [--config RECIPE] [{first}] [OPTIONS]",
        description="Every option can also stand in a YAML file, as in the recipes. --model CLASS and --data CLASS take "
        "classes of your own.",
        epilog=f"All options of Lightning's Trainer: resnet-finetune {verb} --help_all",
    )
    parser.add_argument(
        "--config",
        help="a YAML file or the name of a recipe, see: resnet-finetune recipes; without it, the number of pictures per class "
        "chooses one",
    )
    parser.add_argument(
        "--ckpt_path", help="a run's folder, a checkpoint, or 'last': fit goes on with it, validate and test measure"
    )
    parser.add_argument("--track", help="where to follow the run: wandb, tensorboard, or both with a comma (docs/tracking.md)")
    parser.add_argument("--trust", help="a package that the configuration may name classes of (docs/damaged_data.md)")
    parser.add_argument("--seed_everything", type=int, default=0, help="seed of all that is random but the split")
    parser.add_class_arguments(RunOptions, "run")
    if verb == "adapt":
        text = "also train with --model.adaptation SourceOnly and AdaBN, and print one table; the same with fit"
        parser.add_argument("--compare", action="store_true", help=text)
    parser.add_class_arguments(data, "data")
    parser.add_class_arguments(model, "model", skip={"num_classes", "class_names"})
    shown = {"max_epochs", "max_steps", "accelerator", "devices", "precision", "fast_dev_run", "gradient_clip_val"}
    shown |= {"accumulate_grad_batches", "limit_train_batches"}
    hidden: set[Any] = set(inspect.signature(L.Trainer.__init__).parameters) - shown - {"self"}
    parser.add_class_arguments(L.Trainer, "trainer", skip=hidden)
    parser.set_defaults({f"trainer.{name}": value for name, value in trainer_defaults().items() if name in shown})
    return parser.format_help()
