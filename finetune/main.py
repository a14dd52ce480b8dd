"""The command `resnet-finetune`: choose the verb, import what it needs, and turn a user's mistake into one clear message.

Nothing here imports torch, so that `--help`, `--version` and `recipes` answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from finetune.errors import FinetuneError, did_you_mean, own_error
from finetune.recipe_files import copy_recipe, list_recipes
from finetune.version import __version__

TRAINER_VERBS = {
    "fit": "train, validate, and test the best checkpoint if there is a test split",
    "validate": "measure a checkpoint on the validation split",
    "test": "measure a checkpoint on the test split",
}
OWN_VERBS = {
    "distill": "teach a backbone what another one knows, on pictures without labels",
    "predict": "name the class of pictures: a checkpoint and a folder -> a CSV file",
    "stages": "show the stages of a backbone",
    "weights": "list the weights that are there for a backbone, here and now",
    "recipes": "list the recipes, or copy one to edit it",
    "reuse": "list what was computed once and is kept for later runs, or clear it",
}

HELP = """usage: resnet-finetune VERB [OPTIONS]

Fine-tune pretrained image backbones on a folder of pictures.

{verbs}

examples:
  resnet-finetune fit --config small --data.root photos/            photos/<class>/<picture>, or photos/{{train,val}}/<class>/
  resnet-finetune fit --ckpt_path last                              go on with the run that was stopped
  resnet-finetune test --ckpt_path runs/small/TIME                  measure a run's best checkpoint again
  resnet-finetune predict runs/small/TIME new/ --out predictions.csv

Each verb explains itself: resnet-finetune fit --help. Version: resnet-finetune --version"""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: The words behind `resnet-finetune`; those of the process if None.
    """
    words = list(sys.argv[1:] if args is None else args)
    try:
        _dispatch(words)
    except BrokenPipeError:  # the reader has enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        own = own_error(error)
        if own is None:
            raise
        _leave(_own_words(own))


def _dispatch(words: list[str]) -> None:
    verb = words[0] if words else "--help"
    if verb in ("-h", "--help"):
        verbs = "\n".join(f"  {name:<10}{text}" for name, text in {**TRAINER_VERBS, **OWN_VERBS}.items())
        print(HELP.format(verbs=f"verbs:\n{verbs}"))
    elif verb == "--version":
        print(f"resnet-finetune {__version__}")
    elif verb == "recipes":
        _recipes(words[1:])
    elif verb == "stages":
        _stages(words[1:])
    elif verb == "weights":
        _weights(words[1:])
    elif verb == "predict":
        _predict(words[1:])
    elif verb == "reuse":
        _reuse(words[1:])
    elif verb in TRAINER_VERBS or verb == "distill":
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())  # a user's own classes: --model my_module.MyModule
        from finetune.training import run

        run(_as_fit(words[1:]) if verb == "distill" else words, called=verb)
    else:
        known = [*TRAINER_VERBS, *OWN_VERBS]
        _leave(f"There is no verb '{verb}'.{did_you_mean(verb, known)} Expected one of: {', '.join(known)}.")


def _as_fit(words: list[str]) -> list[str]:
    """Return the words of `distill` as those of `fit` with the recipe for it; a run that is resumed has its own."""
    resumes = any(word.partition("=")[0] == "--ckpt_path" for word in words)
    return ["fit", *words] if resumes else ["fit", "--config", "distill", *words]


def _own_words(error: FinetuneError) -> str:
    """Return the message of an error, also of one that a data-loading worker handed on inside a traceback."""
    text = str(error)
    marker = f"{type(error).__module__}.{type(error).__qualname__}: "
    return text.rpartition(marker)[2].strip() if "Traceback (most recent call last)" in text else text


def _leave(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


class _Parser(argparse.ArgumentParser):
    """argparse with short errors that name the nearest option."""

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            word = message.removeprefix(prefix).split()[0]
            options = [text for action in self._actions for text in action.option_strings]
            message = f"There is no option '{word}'.{did_you_mean(word.split('=')[0], options)}"
        print(f"error: {message}\nFor all options: {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def _recipes(words: Sequence[str]) -> None:
    parser = _Parser(
        prog="resnet-finetune recipes", description="List the recipes, or copy one to edit it.", allow_abbrev=False
    )
    parser.add_argument("--copy", nargs=2, metavar=("NAME", "FILE"), help="copy a recipe to a file of yours")
    options = parser.parse_args(words)
    if options.copy:
        name, target = options.copy
        copy_recipe(name, Path(target))
        print(f"Copied to {target}. Use it with: resnet-finetune fit --config {target}")
    else:
        print(list_recipes())


def _stages(words: Sequence[str]) -> None:
    parser = _Parser(prog="resnet-finetune stages", description="Show the stages of a backbone.", allow_abbrev=False)
    parser.add_argument("backbone", help="a timm model name or the dotted path of your own nn.Module")
    parser.add_argument("--input", type=int, metavar="PIXELS", help="side of the picture; default: what the weights expect")
    parser.add_argument("--num_classes", type=int, default=1000, help="classes of the head (default: 1000)")
    options = parser.parse_args(words)
    sys.path.insert(0, os.getcwd())
    from finetune.boundaries import stage_table

    print(stage_table(options.backbone, options.num_classes, options.input))


def _weights(words: Sequence[str]) -> None:
    parser = _Parser(
        prog="resnet-finetune weights",
        description="List the weights that are there here and now (cached, hub, bundled, package), and what to type.",
        allow_abbrev=False,
    )
    parser.add_argument("backbone", nargs="?", help="a timm model name; without one, all weights on this machine")
    options = parser.parse_args(words)
    from finetune.weight_list import weights_table

    print(weights_table(options.backbone))


def _reuse(words: Sequence[str]) -> None:
    parser = _Parser(
        prog="resnet-finetune reuse",
        description="List what frozen stages made of pictures and is kept for later runs (--data.reuse), or clear it.",
        allow_abbrev=False,
    )
    parser.add_argument("--clear", action="store_true", help="delete what is listed")
    parser.add_argument("--unused", type=float, metavar="DAYS", default=0.0, help="only what was not used for so many days")
    options = parser.parse_args(words)
    from finetune.store import clear_kept, kept_table

    print(clear_kept(options.unused) if options.clear else kept_table(options.unused))


def _predict(words: Sequence[str]) -> None:
    parser = _Parser(
        prog="resnet-finetune predict",
        description="Name the class of pictures and write file, label, probability and the runners-up to a CSV file.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", help="a .ckpt file, a run's folder (its best checkpoint), or 'last'")
    parser.add_argument("pictures", nargs="+", help="folders (searched to the bottom) and files")
    parser.add_argument("--out", default="predictions.csv", help="where to write (default: predictions.csv)")
    parser.add_argument("--topk", type=int, default=3, help="how many classes per picture (default: 3)")
    parser.add_argument("--batch_size", type=int, default=64, help="pictures at a time (default: 64)")
    parser.add_argument("--workers", type=int, help="processes that read pictures (default: from the cores)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    options = parser.parse_args(words)
    sys.path.insert(0, os.getcwd())
    from finetune.predict import predict_to_csv

    predict_to_csv(**vars(options))
