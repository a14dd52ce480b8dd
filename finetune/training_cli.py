"""LightningCLI with our defaults: what `fit`, `validate` and `test` build, and how a run begins and goes on."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden

from finetune import checkpoints, hardware, progress, slurm
from finetune.averaging import kind_of_average, refuse_other_average
from finetune.closing import close_run, metric_table, say_once
from finetune.defaults import RunOptions
from finetune.errors import CheckpointError, ConfigError, FinetuneError
from finetune.finite import require_finite
from finetune.launchers import settle_processes
from finetune.library_errors import explained
from finetune.module import FinetuneModule
from finetune.output_places import is_run, require_no_links, require_own_places
from finetune.parser import instantiate
from finetune.record import read_record
from finetune.repeats import Repeated, plan_repeats
from finetune.resuming import compare_data, compare_run, progress_text, resolve_checkpoint, restoring, warning_of_older
from finetune.resuming import progress as progress_of
from finetune.room import is_full, unwritable
from finetune.run_callbacks import RunCallbacks
from finetune.run_split import split_in
from finetune.runs import (
    CONFIG,
    RESUMED_CONFIG,
    AtomicCheckpointIO,
    as_typed,
    new_run,
    only_here,
    run_home,
    run_of,
)
from finetune.sample import BUILT_IN
from finetune.split_data import SplitDataModule
from finetune.stopping import code_of, how_to_go_on, stop_signal
from finetune.strategies import choose_strategy, processes_of
from finetune.tracking import build_trackers, closing_if_it_fails, conclude, flat_options, parse_names
from finetune.trusted_code import require_all_trusted
from finetune.weight_sources import obtainable

_FROM_RANDOM = {"freezing": "full", "bn": "train", "head_init": "default", "lr": 1e-3, "lr_decay": 1.0, "lr_scale": None}


def _num_classes(data: Any) -> int:
    """Return the number of classes of a data module, which knows it as `num_classes` or as the length of `classes`."""
    number = getattr(data, "num_classes", None)
    if number is None and getattr(data, "classes", None) is not None:
        number = len(data.classes)
    if number is None:
        raise ConfigError(
            f"The data module {type(data).__name__} does not say how many classes there are: expected an attribute or property "
            "'num_classes' (or 'classes') that is ready before setup(). Add one to it."
        )
    return int(number)


def _class_names(data: Any) -> list[str] | None:
    names = getattr(data, "classes", None)
    return None if names is None else [str(name) for name in names]


class FinetuneCLI(LightningCLI):
    """LightningCLI with our defaults, the run's folder, and resume as a run's owner would expect it.

    Args:
        typed: The options that stand on the command line, as opposed to a configuration file.
        command: The words as the user typed them, for the run's record.
        *args: Arguments of LightningCLI.
        **kwargs: Arguments of LightningCLI.
    """

    def __init__(self, typed: Collection[str], command: Sequence[str], *args: Any, **kwargs: Any) -> None:
        self.typed, self.command = typed, command
        self.kept: RunCallbacks | None = None
        self._given_weights: str | None = None
        super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's options and the link from the data's classes to the model."""
        parser.add_class_arguments(RunOptions, "run")
        parser.link_arguments("data", "model.init_args.num_classes", compute_fn=_num_classes, apply_on="instantiate")
        parser.link_arguments("data", "model.init_args.class_names", compute_fn=_class_names, apply_on="instantiate")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Leave out `predict`, which is a verb of ours."""
        return {verb: skip for verb, skip in LightningCLI.subcommands().items() if verb != "predict"}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the words that were given, whatever `sys.argv` holds."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Leave the flags as they are: Lightning would let the checkpoint's values override them without a word."""

    def before_instantiate_classes(self) -> None:
        """Decide on weights before the model looks for them."""
        for kind in (L.LightningModule, L.LightningDataModule):
            self.parser.add_instantiator(instantiate, kind, subclasses=True)
        config = self.config[self.subcommand]
        require_all_trusted(config.as_dict())  # where no class is expected, the parser leaves a class path as it is
        options = config.model.get("init_args") or {}
        self.resumes = self._checkpoint_of(config)
        self._asked_classes = options.get("num_classes") if self.resumes is None else None
        several = plan_repeats(config) if self.subcommand == "fit" else None
        if several is not None:
            raise Repeated(several)
        if self.subcommand != "fit" and self.resumes is None:
            raise ConfigError(f"What shall be measured? Name a run or a checkpoint: {self.subcommand} --ckpt_path RUN")
        if config.get("weights_only") is False:
            raise ConfigError("--weights_only false would run code inside the checkpoint, which is never done. Leave it out.")
        if self.resumes is not None:
            self._look_into(self.resumes, config)
        if "weights" in options:
            self._settle_weights(config, options)
        self._settle_average(config.run, options.get("weights"))

    def _settle_weights(self, config: Any, options: Any) -> None:
        """Say where weights come from: of a checkpoint, or from nowhere if it is only the built-in data."""
        root = (config.data.get("init_args") or {}).get("root")
        if self.resumes is not None:
            self._given_weights = options["weights"]
            config.model.init_args.weights = "none"  # the checkpoint brings them
        elif options["weights"] == "auto" and root in BUILT_IN and not obtainable(options["backbone"]):
            self._start_random(config.model.init_args, config.data.get("init_args") or {})

    def _settle_average(self, run: Any, weights: Any) -> None:
        """Leave out a recipe's mixture with pretrained weights where there are none, or another average is asked for."""
        if run.wise_ft is None or "--run.wise_ft" in self.typed:
            return
        another, never = "--run.ema" in self.typed, self.resumes is not None and self.average is None
        if another or never or (self.resumes is None and weights == "none"):
            run.wise_ft = None

    def _checkpoint_of(self, config: Any) -> Path | None:
        """Return the checkpoint to start from: the one that is asked for, or that of a job which was requeued."""
        if config.get("ckpt_path"):
            found = resolve_checkpoint(config.ckpt_path, config.run, str(self.subcommand))
        elif self.subcommand == "fit" and (again := slurm.requeued_checkpoint(self._job_folder(config.run))):
            found = again
        else:
            return None
        config.ckpt_path = str(found)
        return found

    def _job_folder(self, options: Any) -> Path | None:
        return slurm.job_folder(run_home(Path(options.folder), options.name or "run"), self.command)

    def _look_into(self, checkpoint: Path, config: Any) -> None:
        """Read a checkpoint before anything is built or written, and say what will be continued."""
        inside = checkpoints.read(checkpoint)
        needed = {"epoch", "global_step"} | ({"optimizer_states", "loops"} if self.subcommand == "fit" else set())
        if lacking := sorted(needed - inside.keys()):
            raise CheckpointError(
                f"{checkpoint} holds weights, but no state of a training ({', '.join(lacking)}). Start from its weights: "
                f"--model.weights {checkpoint}"
            )
        require_finite(inside["state_dict"], as_typed(checkpoint))
        self.done_steps, done = int(inside["global_step"]), progress_of(inside)[0]
        self.done_epochs = done
        self.average = kind_of_average(inside)
        self.stored = {key: inside.get(key) for key in ("hyper_parameters", "datamodule_hyper_parameters", checkpoints.KEY)}
        if self.subcommand == "fit":
            say_once(f"Resuming {as_typed(checkpoint)}: {progress_text(inside)}.")
            if older := warning_of_older(checkpoint, inside):
                say_once(older)
            if 0 < (config.trainer.max_epochs or -1) <= done:
                say_once(f"Nothing is left to train; --trainer.max_epochs above {done} would go on.")

    def after_instantiate_classes(self) -> None:
        """Let the saved configuration say what was given, not what a resumed run made of it."""
        if self.resumes is not None and isinstance(self.model, FinetuneModule):
            checkpoints.require_own(self.stored, self.resumes)
            self._take_split(self.resumes)
            self.model.expect(checkpoints.stamped_input(self.stored))  # the data ask for it before Lightning loads the rest
        if self._given_weights is not None:
            self.config[self.subcommand].model.init_args.weights = self._given_weights

    def _take_split(self, checkpoint: Path) -> None:
        """Let the data keep to what the run of a checkpoint trained on and held out."""
        if isinstance(self.datamodule, SplitDataModule):
            checkpoints.refuse_other_classes(self.stored, self.model)
            self.datamodule.continue_from(split_in(checkpoint, {**self.stored, "epoch": self.done_epochs - 1}))

    def _start_random(self, options: Any, data: Any) -> None:
        """Fall back to random weights, on the built-in data only; nothing random may stay frozen, so nothing can be kept."""
        options.weights = "none"
        if "reuse" in data and "--data.reuse" not in self.typed:
            data["reuse"] = "off"
        for name, value in _FROM_RANDOM.items():
            if f"--model.{name}" not in self.typed:
                options[name] = value
        say_once(
            f"\n*** No pretrained weights for {options.backbone} can be had: none came along, and the hub does not answer.\n"
            "*** As this is only the built-in data, training starts from RANDOM weights, and everything trains instead of\n"
            "*** what the recipe freezes. For your own pictures give weights: --model.weights FILE (docs/weights.md)\n"
        )

    def _compare_classes(self) -> None:
        """Refuse a number of classes that is not that of the data, which takes its place."""
        asked, found = self._asked_classes, getattr(self.model, "hparams", {}).get("num_classes")
        if asked is not None and found is not None and asked != found:
            raise ConfigError(
                f"model.num_classes is {asked}, but the data has {found} classes. The number comes from the data: leave it out."
            )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the trainer with the run's folder, its loggers and its checkpoints."""
        config = {**self._get(self.config_init, "trainer"), **kwargs}
        options = self._get(self.config_init, "run")
        if self.subcommand == "fit":
            _refuse_no_training(config)
        self.run_folder: Path | None = None
        self._compare_classes()
        if self.resumes is not None and self.subcommand == "fit":
            refuse_other_average(self.average, options)
        parse_names(options.track)  # before there is a folder
        self._warn_of_emulation(config["precision"])
        if settled := settle_processes(config):
            say_once(settled)
        config["strategy"] = choose_strategy(config["strategy"], self.model, processes_of(config))
        if config["enable_progress_bar"] is None:
            config["enable_progress_bar"] = progress.wanted()
        given = config["callbacks"] if isinstance(config["callbacks"], list) else [config["callbacks"]]
        own_bar = config["enable_progress_bar"] and not any(isinstance(one, ProgressBar) for one in given)
        callbacks: list[L.Callback] = [progress.Bar()] if own_bar else []
        if getattr(rank_zero_only, "rank", 0) == 0:
            require_own_places(_as_list(config["logger"]), _as_list(config["callbacks"]), self.resumes)
        if self.subcommand == "fit" and not config["fast_dev_run"]:
            self.run_folder = self._run_folder(options)
            config["default_root_dir"] = str(self.run_folder)
            config["logger"] = self._loggers(config["logger"], options, self.run_folder)
            config["plugins"] = _with_checkpoint_io(config["plugins"])
            self.kept = RunCallbacks(options, self.run_folder, self.command, config["enable_checkpointing"] is not False)
            callbacks += self.kept.every
            if (self.run_folder / CONFIG).exists():
                self.save_config_kwargs = {**self.save_config_kwargs, "config_filename": RESUMED_CONFIG}
        else:
            config["logger"] = config["logger"] or False
            self.save_config_callback = None
            if self.subcommand != "fit":
                config["enable_checkpointing"] = False
        try:
            return self._instantiate_trainer(config, callbacks)
        except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
            raise ConfigError(f"The trainer cannot be made with these options: {error}") from error

    def _run_folder(self, options: RunOptions) -> Path:
        home = run_of(self.resumes) if self.resumes is not None else None
        if home is not None and not is_run(home):
            say_once(f"note   {as_typed(home)} is no folder of a run: what follows is kept in a new run.")
            home = None
        if home is not None:
            require_no_links(home)
            _require_writable(home)
        return home or new_run(Path(options.folder), options.name or "run", self._job_folder(options))

    def _loggers(self, given: Any, options: RunOptions, run_folder: Path) -> Any:
        if given is False:
            return False
        until = None if self.resumes is None else self.done_steps
        return [*build_trackers(options, run_folder, until), *_as_list(given)]

    @staticmethod
    def _warn_of_emulation(precision: Any) -> None:
        if str(precision).startswith("bf16") and hardware.bf16_is_emulated():
            say_once("warning: this machine computes bfloat16 in software: --trainer.precision 32-true is many times faster")

    def fit(self, **kwargs: Any) -> None:
        """Train; when interrupted, say how to go on."""
        if self.resumes is not None and isinstance(self.model, FinetuneModule):
            checkpoints.refuse_other_classes(self.stored, self.model)
            checkpoints.refuse_other_options(self.stored["hyper_parameters"] or {}, self.model.hparams)
            facts = checkpoints.run_facts(self.trainer)
            for warning in filter(None, (compare_data(self.stored, self.datamodule), compare_run(self.stored, facts))):
                say_once(warning)
            self._tell_changes()
        if self.kept is not None:
            self.kept.tracking.config = flat_options(self.config[self.subcommand].as_dict(), self.model)
        try:
            here = self.run_folder if self.trainer.is_global_zero else None
            with only_here(here), closing_if_it_fails(self.trainer.loggers):
                self.trainer.fit(**kwargs)
        except MisconfigurationException as error:
            raise explained(error) or ConfigError(str(error)) from error
        except BaseException as error:
            self._stopped(error)
            if self.resumes is not None and restoring(error):
                raise CheckpointError(
                    f"The state of the training in {as_typed(self.resumes)} cannot be restored ({type(error).__name__}: "
                    f"{str(error)[:200]}). It is damaged, or of another optimizer or callback. Resume another checkpoint of "
                    f"the run, or start a new run from its weights: --model.weights {as_typed(self.resumes)}"
                ) from error
            raise
        finally:
            if self.kept is not None and self.kept.last is not None:
                self.kept.last.interrupts.forget()
        if self.run_folder is not None:  # which the first process chose
            self.run_folder = Path(self.trainer.strategy.broadcast(str(self.run_folder)))

    def _stopped(self, error: BaseException) -> None:
        """Say how to go on after a signal, and what to do about a full disk; other errors are left to the caller."""
        asked = self.kept.last.interrupts.asked if self.kept is not None and self.kept.last is not None else None
        run = None if self.run_folder is None else Path(as_typed(self.run_folder))
        if stop_signal(error) or (asked and not isinstance(error, FinetuneError)):
            say_once(how_to_go_on(run))
            raise SystemExit(code_of(error, asked)) from None
        if run is not None and is_full(error) and not isinstance(error, FinetuneError):
            raise CheckpointError(f"{unwritable(run, error, 0)}{how_to_go_on(run)}") from error

    def after_fit(self) -> None:
        """Measure the best checkpoint, and let those that follow the run know what came out."""
        if self.run_folder is None or self.kept is None:
            return
        with closing_if_it_fails(self.trainer.loggers):
            if self.kept.best is not None:
                close_run(self.run_folder, self.trainer, self.kept.best, self.kept.epochs)
            if self.trainer.is_global_zero:
                conclude(self.trainer.loggers, self.run_folder, read_record(self.run_folder), self.trainer.global_step)

    def _tell_changes(self) -> None:
        if isinstance(self.datamodule, SplitDataModule):
            self.datamodule.split_images()  # which are compared with those of the run
            if self.trainer.is_global_zero:
                self.datamodule.tell_changes()

    def validate(self, **kwargs: Any) -> None:
        """Validate and print the metrics."""
        self._require_loader("val_dataloader", "validation")
        self._tell_changes()
        say_once(metric_table(self.trainer.validate(**{**kwargs, "verbose": False})))

    def test(self, **kwargs: Any) -> None:
        """Test and print the metrics."""
        self._require_loader("test_dataloader", "test")
        self._tell_changes()
        say_once(metric_table(self.trainer.test(**{**kwargs, "verbose": False})))

    def _require_loader(self, name: str, purpose: str) -> None:
        """Refuse to measure where the data module has nothing for it, which Lightning would answer with a traceback."""
        if not is_overridden(name, self.datamodule, L.LightningDataModule):
            kind = type(self.datamodule).__name__
            raise ConfigError(
                f"The data module {kind} defines no {name}, so there are no images for the {purpose}. Measure on a labelled "
                f"folder: resnet-finetune evaluate {as_typed(self.resumes) if self.resumes else 'RUN'} FOLDER"
            )


def _require_writable(home: Path) -> None:
    if not os.access(home, os.W_OK):
        raise CheckpointError(
            f"{as_typed(home)} cannot be written, and a resumed run goes on in its folder. Make it writable, or resume a copy: "
            f"cp -r {as_typed(home)} COPY && resnet-finetune fit --ckpt_path COPY"
        )


def _as_list(given: Any) -> list[Any]:
    return [] if given in (None, True, False) else given if isinstance(given, list) else [given]


def _refuse_no_training(options: Mapping[str, Any]) -> None:
    """Refuse options of the trainer with which a run cannot be one."""
    if options.get("barebones"):
        raise ConfigError(
            "trainer.barebones leaves out the metrics, checkpoints and progress that a run consists of. Leave it out; to see "
            "that a training runs at all: --trainer.fast_dev_run true."
        )
    for name in ("max_epochs", "max_steps"):
        if options.get(name) == 0:
            raise ConfigError(
                f"trainer.{name} is 0, so nothing would be trained. Expected at least 1. To measure a run: resnet-finetune "
                "validate --ckpt_path RUN"
            )


def _with_checkpoint_io(plugins: Any) -> list[Any]:
    given = [] if plugins is None else plugins if isinstance(plugins, list) else [plugins]
    return given if any(isinstance(plugin, CheckpointIO) for plugin in given) else [*given, AtomicCheckpointIO()]
