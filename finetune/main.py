"""The command `resnet-finetune`: choose the verb, import what it needs, and turn a user's mistake into one clear message.

Nothing here imports torch, so that `--help`, `--version` and `recipes` answer at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from finetune.console import clean_messages, say
from finetune.errors import ConfigError, FinetuneError, did_you_mean, own_error
from finetune.library_errors import explained
from finetune.own_modules import inherit_own_modules, own_modules, protect_processes
from finetune.trusted_code import guarding, is_guarded, take_trust
from finetune.verbs import VERBS
from finetune.version import __version__

TRAINER_VERBS = {
    "fit": "train, validate, and test the best checkpoint if there is a test split",
    "validate": "measure a checkpoint on the validation split",
    "test": "measure a checkpoint on the test split",
    "lr-find": "raise the learning rate step by step and suggest one, ratios between stages kept",
    "adapt": "learn from labelled pictures of one kind and unlabelled ones of another (domain adaptation)",
    "distill": "teach a backbone what another one knows, on pictures without labels",
}
_RECIPE_OF = {"distill": "distill", "adapt": "domain_adaptation"}
_COMPARE = "--compare"
_TEXTS = {**TRAINER_VERBS, **{name: verb.text for name, verb in VERBS.items()}}

HELP = """usage: resnet-finetune VERB [OPTIONS]

Fine-tune pretrained image backbones on a folder of pictures.

{verbs}

examples:
  resnet-finetune fit --config small --data.root photos/            photos/<class>/<picture>, or photos/{{train,val}}/<class>/
  resnet-finetune check photos/                                     cut off, empty, twice, under two labels, ...
  resnet-finetune fit --ckpt_path last                              go on with the run that was stopped
  resnet-finetune test --ckpt_path runs/small/TIME                  measure a run's best checkpoint again
  resnet-finetune predict runs/small/TIME new/ --out predictions.csv
  resnet-finetune report runs/small/TIME runs/large/TIME            compare runs, also while they are going on

Each verb explains itself: resnet-finetune fit --help. Version: resnet-finetune --version"""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: The words behind `resnet-finetune`; those of the process if None.

    Raises:
        ConfigError: If it is called from within itself, as a configuration or a checkpoint might try.
    """
    if is_guarded():
        raise ConfigError(
            "The command was called while it was running, by a class or function that a configuration or a checkpoint names. "
            "Its arguments were typed by nobody, and it is not run. Start it in a process of its own."
        )
    words = list(sys.argv[1:] if args is None else args)
    if args is None:
        protect_processes()
    try:
        packages, words = take_trust(words)
        with clean_messages(), guarding(words, packages), own_modules():
            _dispatch(words)
    except BrokenPipeError:  # the reader has enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        own = own_error(error) or explained(error)
        if own is None:
            raise
        _leave(_own_words(own))


def _dispatch(words: list[str]) -> None:
    verb = words[0] if words else "--help"
    if verb in ("-h", "--help"):
        verbs = "\n".join(f"  {name:<10}{text}" for name, text in _TEXTS.items())
        say(HELP.format(verbs=f"verbs:\n{verbs}"))
    elif verb == "--version":
        say(f"resnet-finetune {__version__}")
    elif verb in _TEXTS:
        if verb in VERBS:
            VERBS[verb].run(words[1:])
        elif _COMPARE in words and verb in ("fit", "adapt"):
            from finetune.compare import compare

            rest = [word for word in words[1:] if word != _COMPARE]
            compare(_as_fit(verb, rest) if verb in _RECIPE_OF else [verb, *rest])
        elif verb == "lr-find":
            from finetune.lr_verb import run as find

            find(words[1:])
        else:
            from finetune.training import run

            run(_as_fit(verb, words[1:]) if verb in _RECIPE_OF else words, called=verb)
    else:
        _leave(f"There is no verb '{verb}'.{did_you_mean(verb, _TEXTS)} Expected one of: {', '.join(_TEXTS)}.")


def _as_fit(verb: str, words: list[str]) -> list[str]:
    """Return the words of `distill` or `adapt` as those of `fit` with the recipe for it; a run that is resumed has its own."""
    resumes = any(word.partition("=")[0] == "--ckpt_path" for word in words)
    return ["fit", *words] if resumes else ["fit", "--config", _RECIPE_OF[verb], *words]


def _own_words(error: FinetuneError) -> str:
    """Return the message of an error, also of one that a data-loading worker handed on inside a traceback."""
    text = str(error)
    marker = f"{type(error).__module__}.{type(error).__qualname__}: "
    return text.rpartition(marker)[2].strip() if "Traceback (most recent call last)" in text else text


def _leave(message: str) -> NoReturn:
    say(f"error: {message}", error=True)
    raise SystemExit(2)


inherit_own_modules()
