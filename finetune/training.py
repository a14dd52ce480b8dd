"""The verbs that need a trainer, `fit`, `validate` and `test`, through LightningCLI."""

from __future__ import annotations

import contextlib
import logging
import shlex
import time
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from tabulate import tabulate

from finetune import checkpoints, hardware, progress, slurm
from finetune.adapt import AdaptModule
from finetune.arguments import resolve
from finetune.augmented import AugmentedPictures
from finetune.averaging import AVERAGED, BestEpochs, PhaseEMA
from finetune.callbacks import EpochLine, PhaseEarlyStopping
from finetune.defaults import RunOptions, trainer_defaults
from finetune.domain_table import domain_table
from finetune.domains import measure_domains
from finetune.errors import CheckpointError, ConfigError, FinetuneError
from finetune.explain import draw_mistakes
from finetune.gradient_flow import GradientFlow
from finetune.keep_outcomes import KeepOutcomes
from finetune.module import FinetuneModule
from finetune.nonfinite import NonFiniteLoss
from finetune.parser import Parser, instantiate, own_errors
from finetune.recipe_choice import choose_recipe
from finetune.record import RunRecord, read_record
from finetune.repeats import Repeated, plan_repeats, repeat
from finetune.report import write_report
from finetune.resuming import compare_data, compare_run, progress_text, resolve_checkpoint, warning_of_older
from finetune.resuming import progress as progress_of
from finetune.room import is_full, unwritable
from finetune.runs import CHECKPOINTS, CONFIG, RESUMED_CONFIG, AtomicCheckpointIO, new_run, run_of
from finetune.sample import BUILT_IN
from finetune.saving import LastCheckpoint
from finetune.stopping import code_of, how_to_go_on, stop_signal
from finetune.strategies import choose_strategy, processes_of
from finetune.tracking import Tracking, build_trackers, closing_if_it_fails, conclude, flat_options, parse_names
from finetune.trusted_code import guarded_parser, require_all_trusted
from finetune.usage import help_text
from finetune.version import __version__
from finetune.weight_sources import obtainable


def run(words: list[str], called: str | None = None, cli: type[FinetuneCLI] | None = None) -> None:
    """Run a verb: `fit`, `validate` or `test` and its options.

    Args:
        words: The verb and its options.
        called: The verb that the user typed, if it is another name for one of these.
        cli: What carries it out; FinetuneCLI unless given.
    """
    if {"-h", "--help"} & set(words):
        print(help_text(called or words[0]))
        return
    words = ["--help" if word == "--help_all" else word for word in words]
    typed = {word.partition("=")[0] for word in words}
    command = ["resnet-finetune", *words]
    choice = choose_recipe(words[1:]) if words[0] == "fit" else None
    if choice is not None:
        recipe, reason = choice
        rank_zero_print(f"recipe {recipe}: {reason} (another: --config NAME; resnet-finetune recipes lists them)")
        words = ["fit", "--config", recipe, *words[1:]]
    asked, words = words, _with_default_classes(resolve(words))
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # devices found, tips, where checkpoints were loaded from
    with warnings.catch_warnings(), own_errors(), guarded_parser():
        for message in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        try:
            (cli or FinetuneCLI)(
                typed,
                command,
                L.LightningModule,
                L.LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                trainer_defaults=trainer_defaults(),
                seed_everything_default=0,
                parser_class=Parser,
                parser_kwargs=_PARSER_OPTIONS,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                save_config_kwargs={"overwrite": True},
                args=words,
            )
        except Repeated as several:
            repeat(asked, several.plan)
        except (KeyboardInterrupt, SystemExit) as stop:
            raise SystemExit(code_of(stop)) from None  # that of a shell where a signal ended it


def _with_default_classes(words: list[str]) -> list[str]:
    """Put our classes before the options, where anything that follows can replace them.

    As defaults of the parser they would come with the values of all their options, and jsonargparse hands those on to a class
    that replaces them and has options of the same names, as if somebody had chosen them.

    >>> _with_default_classes(["fit", "--data", "theirs.Data"])[-2:]
    ['--data', 'theirs.Data']
    """
    return [*words[:1], "--model", "finetune.FinetuneModule", "--data", "finetune.FolderDataModule", *words[1:]]


_FROM_RANDOM = {"freezing": "full", "bn": "train", "head_init": "default", "lr": 1e-3, "lr_decay": 1.0, "lr_scale": None}
_STRICT = {"allow_abbrev": False}
_PARSER_OPTIONS = {"prog": "resnet-finetune", "version": __version__, **_STRICT}
_PARSER_OPTIONS |= dict.fromkeys(("fit", "validate", "test"), _STRICT)
_EXPECTED_WARNINGS = (
    r".*The number of training batches",  # metrics are logged by epoch; only learning rates follow log_every_n_steps
    r".*does not have many workers",  # the data module chose the number of workers from the cores
    r".*LeafSpec.*",  # Lightning 2.6 under torch 2.14, in every fit
    r".*Checkpoint directory .* exists and is not empty",  # a resumed run goes on in its own folder
    r".*callbacks used to create the checkpoint need to be provided",  # `test` and `validate` keep no checkpoints
)


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
        self.best: ModelCheckpoint | None = None
        self.epochs: BestEpochs | None = None
        self.last: LastCheckpoint | None = None
        self.tracking: Tracking | None = None
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
        if "weights" not in options:
            return
        root = (config.data.get("init_args") or {}).get("root")
        if self.resumes is not None:
            self._given_weights = options["weights"]
            config.model.init_args.weights = "none"  # the checkpoint brings them
        elif options["weights"] == "auto" and root in BUILT_IN and not obtainable(options["backbone"]):
            self._start_random(config.model.init_args, config.data.get("init_args") or {})

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
        return slurm.job_folder(Path(options.folder) / (options.name or "run"), self.command)

    def _look_into(self, checkpoint: Path, config: Any) -> None:
        """Read a checkpoint before anything is built or written, and say what will be continued."""
        inside = checkpoints.read(checkpoint)
        self.done_steps, done = int(inside["global_step"]), progress_of(inside)[0]
        self.averaged = AVERAGED in inside
        self.stored = {key: inside.get(key) for key in ("hyper_parameters", "datamodule_hyper_parameters", checkpoints.KEY)}
        if self.subcommand == "fit":
            rank_zero_print(f"Resuming {_relative(checkpoint)}: {progress_text(inside)}.")
            if older := warning_of_older(checkpoint, inside):
                rank_zero_print(older)
            if 0 < (config.trainer.max_epochs or -1) <= done:
                rank_zero_print(f"Nothing is left to train; --trainer.max_epochs above {done} would go on.")

    def after_instantiate_classes(self) -> None:
        """Let the saved configuration say what was given, not what a resumed run made of it."""
        if self.resumes is not None and isinstance(self.model, FinetuneModule):
            checkpoints.require_own(self.stored, self.resumes)
            self.model.expect(checkpoints.stamped_input(self.stored))  # the data ask for it before Lightning loads the rest
        if self._given_weights is not None:
            self.config[self.subcommand].model.init_args.weights = self._given_weights

    def _start_random(self, options: Any, data: Any) -> None:
        """Fall back to random weights, on the built-in data only; nothing random may stay frozen, so nothing can be kept."""
        options.weights = "none"
        if "reuse" in data and "--data.reuse" not in self.typed:
            data["reuse"] = "off"
        for name, value in _FROM_RANDOM.items():
            if f"--model.{name}" not in self.typed:
                options[name] = value
        rank_zero_print(
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
        self.run_folder: Path | None = None
        self._compare_classes()
        if self.resumes is not None and self.subcommand == "fit" and self.averaged != (options.ema is not None):
            raise ConfigError(
                f"The checkpoint was written {'with' if self.averaged else 'without'} run.ema, and now it is "
                f"{options.ema}: a resumed run goes on as it was. Leave run.ema as it was, or start a new run from the trained "
                f"weights with --model.weights CHECKPOINT."
            )
        parse_names(options.track)  # before there is a folder
        self._warn_of_emulation(config["precision"])
        config["strategy"] = choose_strategy(config["strategy"], self.model, processes_of(config))
        if config["enable_progress_bar"] is None:
            config["enable_progress_bar"] = progress.wanted()
        given = config["callbacks"] if isinstance(config["callbacks"], list) else [config["callbacks"]]
        own_bar = config["enable_progress_bar"] and not any(isinstance(one, ProgressBar) for one in given)
        callbacks: list[L.Callback] = [progress.Bar()] if own_bar else []
        if self.subcommand == "fit" and not config["fast_dev_run"]:
            self.run_folder = self._run_folder(options)
            config["default_root_dir"] = str(self.run_folder)
            config["logger"] = self._loggers(config["logger"], options, self.run_folder)
            config["plugins"] = _with_checkpoint_io(config["plugins"])
            callbacks += self._callbacks(options, self.run_folder, config["enable_checkpointing"] is not False)
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
        return home or new_run(Path(options.folder), options.name or "run", self._job_folder(options))

    def _loggers(self, given: Any, options: RunOptions, run_folder: Path) -> Any:
        if given is False:
            return False
        until = None if self.resumes is None else self.done_steps
        others = [] if given in (None, True) else given if isinstance(given, list) else [given]
        return [*build_trackers(options, run_folder, until), *others]

    def _callbacks(self, options: RunOptions, run_folder: Path, keep: bool) -> list[L.Callback]:
        record = RunRecord(run_folder, self.command)
        self.tracking = Tracking(record)
        callbacks: list[L.Callback] = [EpochLine(), record, AugmentedPictures(run_folder), self.tracking]
        mode = options.mode or ("min" if "loss" in options.monitor else "max")
        if keep:
            where: dict[str, Any] = {"dirpath": run_folder / CHECKPOINTS, "save_on_train_epoch_end": True}
            where["enable_version_counter"] = False
            self.best = ModelCheckpoint(filename="best", monitor=options.monitor, mode=mode, **where)
            callbacks += [KeepOutcomes(run_folder, self.best), self.best]
            if options.soup is not None:
                self.epochs = BestEpochs(run_folder / CHECKPOINTS, options.soup, options.monitor, mode)
                callbacks.append(self.epochs)
            self.last = LastCheckpoint(run_folder / CHECKPOINTS, options.save_every_minutes, beside=1 + (options.soup or 0))
            callbacks.append(self.last)  # it keeps what the others remember
        callbacks.append(NonFiniteLoss(options.on_nonfinite))
        if options.ema is not None:
            callbacks.append(PhaseEMA(options.ema))
        if options.patience is not None:
            callbacks.append(PhaseEarlyStopping(options.monitor, mode=mode, patience=options.patience))
        if options.gradients_every:
            callbacks.append(GradientFlow(run_folder, options.gradients_every))
        return callbacks

    @staticmethod
    def _warn_of_emulation(precision: Any) -> None:
        if str(precision).startswith("bf16") and hardware.bf16_is_emulated():
            rank_zero_print(
                "warning: this machine computes bfloat16 in software: --trainer.precision 32-true is many times faster"
            )

    def fit(self, **kwargs: Any) -> None:
        """Train; when interrupted, say how to go on."""
        if self.resumes is not None and isinstance(self.model, FinetuneModule):
            checkpoints.refuse_other_classes(self.stored, self.model)
            checkpoints.refuse_other_options(self.stored["hyper_parameters"] or {}, self.model.hparams)
            facts = checkpoints.run_facts(self.trainer)
            for warning in filter(None, (compare_data(self.stored, self.datamodule), compare_run(self.stored, facts))):
                rank_zero_print(warning)
        if self.tracking is not None:
            self.tracking.config = flat_options(self.config[self.subcommand].as_dict(), self.model)
        self._began = time.perf_counter()
        try:
            with closing_if_it_fails(self.trainer.loggers):
                self.trainer.fit(**kwargs)
        except MisconfigurationException as error:
            raise ConfigError(str(error)) from error
        except BaseException as error:
            self._stopped(error)
            raise
        finally:
            if self.last is not None:
                self.last.interrupts.forget()
        if self.run_folder is not None:  # which the first process chose
            self.run_folder = Path(self.trainer.strategy.broadcast(str(self.run_folder)))

    def _stopped(self, error: BaseException) -> None:
        """Say how to go on after a signal, and what to do about a full disk; other errors are left to the caller."""
        asked = self.last.interrupts.asked if self.last is not None else None
        run = None if self.run_folder is None else _relative(self.run_folder)
        if stop_signal(error) or (asked and not isinstance(error, FinetuneError)):
            rank_zero_print(how_to_go_on(run))
            raise SystemExit(code_of(error, asked)) from None
        if run is not None and is_full(error) and not isinstance(error, FinetuneError):
            raise CheckpointError(f"{unwritable(run, error, 0)}{how_to_go_on(run)}") from error

    def after_fit(self) -> None:
        """Measure the best checkpoint, and let those that follow the run know what came out."""
        if self.run_folder is None:
            return
        with closing_if_it_fails(self.trainer.loggers):
            self._measure_best()
            if self.trainer.is_global_zero:
                conclude(self.trainer.loggers, self.run_folder, read_record(self.run_folder), self.trainer.global_step)

    def _measure_best(self) -> None:
        """Test the best checkpoint if there is a test split, and say where things are and what to type next."""
        if self.run_folder is None or self.best is None:
            return
        chosen = Path(self.best.best_model_path or self.run_folder / CHECKPOINTS / "last.ckpt")
        if not chosen.is_file():
            rank_zero_print("No checkpoint was written: the run ended before its first epoch did.")
            return
        score = self.best.best_model_score
        if score is not None:
            epoch = int(checkpoints.read(chosen)["epoch"]) + 1
            rank_zero_print(f"\nbest   {self.best.monitor} {float(score):.4f} in epoch {epoch} ({_relative(chosen)})")
        chosen = self._soup(score) or chosen
        rank_zero_print(f"time   {progress.duration(time.perf_counter() - self._began)} for training")
        if self._has_test():
            results = self.trainer.test(datamodule=self.datamodule, ckpt_path=str(chosen), weights_only=True, verbose=False)
            rank_zero_print(_metric_table(results))
        if isinstance(self.model, AdaptModule) and self.trainer.is_global_zero:
            name = type(self.model.adaptation).__name__
            rank_zero_print(f"\n{domain_table({name: self.run_folder})}\n")
        self._write_report(self.run_folder)
        run = _relative(self.run_folder)
        kept = [*self.run_folder.glob("*.*"), *(self.run_folder / CHECKPOINTS).glob("*.ckpt")]
        rank_zero_print(f"files  {run}/  ({', '.join(sorted(str(path.relative_to(self.run_folder)) for path in kept))})")
        if isinstance(self.model, FinetuneModule) and self.model.classifies:
            rank_zero_print(f"next   resnet-finetune predict {shlex.quote(str(run))} PICTURES --out predictions.csv")

    def _soup(self, best: Any) -> Path | None:
        """Average the best epochs if that was asked for, and return the checkpoint if it is better than the best of them."""
        value = None if self.epochs is None else self.epochs.average(self.trainer)
        if self.epochs is None or value is None:
            return None
        better = best is not None and (value > float(best) if self.epochs.mode == "max" else value < float(best))
        verdict = "better, and measured below" if better else "no better"
        rank_zero_print(f"soup   {self.epochs.monitor} {value:.4f}, {verdict} ({_relative(self.epochs.soup)})")
        return self.epochs.soup if better else None

    @rank_zero_only
    def _write_report(self, run: Path) -> None:
        try:
            if isinstance(self.model, FinetuneModule) and self.model.classifies:
                with contextlib.suppress(FinetuneError):  # data without files: there is nothing to look at
                    draw_mistakes(run)
                    measure_domains(run)
            write_report(run)
        except Exception as error:  # whatever is wrong with a figure, the training is done
            print(f"warning: The report could not be written ({error}). Try again: resnet-finetune report {_relative(run)}")

    def _has_test(self) -> bool:
        if not is_overridden("test_step", self.model, L.LightningModule):
            return False
        has = getattr(self.datamodule, "has_test", None)
        return bool(has) if has is not None else is_overridden("test_dataloader", self.datamodule, L.LightningDataModule)

    def validate(self, **kwargs: Any) -> None:
        """Validate and print the metrics."""
        rank_zero_print(_metric_table(self.trainer.validate(**{**kwargs, "verbose": False})))

    def test(self, **kwargs: Any) -> None:
        """Test and print the metrics."""
        rank_zero_print(_metric_table(self.trainer.test(**{**kwargs, "verbose": False})))


@rank_zero_only
def rank_zero_print(text: str) -> None:
    """Print on the first of several processes."""
    print(text)


def _metric_table(results: Any) -> str:
    rows = [(name, f"{float(value):.4f}") for result in results for name, value in result.items()]
    return tabulate(rows, headers=["metric", "value"], disable_numparse=True, colalign=("left", "right"))


def _with_checkpoint_io(plugins: Any) -> list[Any]:
    given = [] if plugins is None else plugins if isinstance(plugins, list) else [plugins]
    return given if any(isinstance(plugin, CheckpointIO) for plugin in given) else [*given, AtomicCheckpointIO()]


def _relative(path: Path) -> Path:
    path = path.absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
