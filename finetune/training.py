"""The verbs that need a trainer, `fit`, `validate` and `test`: from the words of a command to a training."""

from __future__ import annotations

import logging
import warnings

import lightning as L

from finetune.arguments import resolve
from finetune.closing import say_once
from finetune.console import say
from finetune.defaults import trainer_defaults
from finetune.parser import Parser, called_as, own_errors
from finetune.recipe_choice import choose_recipe
from finetune.repeats import Repeated, repeat
from finetune.stopping import code_of
from finetune.training_cli import FinetuneCLI
from finetune.trusted_code import guarded_parser
from finetune.usage import help_text
from finetune.version import __version__


def run(words: list[str], called: str | None = None, cli: type[FinetuneCLI] | None = None) -> None:
    """Run a verb: `fit`, `validate` or `test` and its options.

    Args:
        words: The verb and its options.
        called: The verb that the user typed, if it is another name for one of these.
        cli: What carries it out; FinetuneCLI unless given.
    """
    if {"-h", "--help"} & set(words):
        say(help_text(called or words[0]))
        return
    words = ["--help" if word == "--help_all" else word for word in words]
    typed = {word.partition("=")[0] for word in words}
    command = ["resnet-finetune", *words]
    choice = choose_recipe(words[1:]) if words[0] == "fit" else None
    if choice is not None:
        recipe, reason = choice
        say_once(f"recipe {recipe}: {reason} (another: --config NAME; resnet-finetune recipes lists them)")
        words = ["fit", "--config", recipe, *words[1:]]
    asked, words = words, _with_default_classes(resolve(words))
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # devices found, tips, where checkpoints were loaded from
    with warnings.catch_warnings(), own_errors(), guarded_parser(), called_as(called or words[0]):
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


_STRICT = {"allow_abbrev": False}
_PARSER_OPTIONS = {"prog": "resnet-finetune", "version": __version__, **_STRICT}
_PARSER_OPTIONS |= dict.fromkeys(("fit", "validate", "test"), _STRICT)
_EXPECTED_WARNINGS = (
    r".*The number of training batches",  # metrics are logged by epoch; only learning rates follow log_every_n_steps
    r".*does not have many workers",  # the data module chose the number of workers from the cores
    r".*LeafSpec.*",  # Lightning 2.6 under torch 2.14, in every fit
    r".*could not find the monitored key in the returned metrics",  # without validation, which is said before
    r".*Checkpoint directory .* exists and is not empty",  # a resumed run goes on in its own folder
    r".*callbacks used to create the checkpoint need to be provided",  # `test` and `validate` keep no checkpoints
)
