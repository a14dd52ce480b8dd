"""The verbs that need no trainer: their options, and what they call. Heavy imports wait until a verb is called."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from finetune.console import say
from finetune.errors import did_you_mean
from finetune.recipe_files import copy_recipe, list_recipes

_MODEL = "a run's folder (its best checkpoint), a .ckpt file, 'last', or an export: an .onnx file or a timm folder"


class _Parser(argparse.ArgumentParser):
    """argparse with short errors that name the nearest option."""

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            word = message.removeprefix(prefix).split()[0]
            options = [text for action in self._actions for text in action.option_strings]
            message = f"There is no option '{word}'.{did_you_mean(word.split('=')[0], options)}"
        say(f"error: {message}\nFor all options: {self.prog} --help", error=True)
        raise SystemExit(2)


def _recipes(words: Sequence[str]) -> None:
    parser = _Parser(
        prog="resnet-finetune recipes", description="List the recipes, or copy one to edit it.", allow_abbrev=False
    )
    parser.add_argument("--copy", nargs=2, metavar=("NAME", "FILE"), help="copy a recipe to a file of yours")
    options = parser.parse_args(words)
    if options.copy:
        name, target = options.copy
        command = copy_recipe(name, Path(target))
        say(f"Copied to {target}. Use it with: {command}")
    else:
        say(list_recipes())


def _stages(words: Sequence[str]) -> None:
    parser = _Parser(prog="resnet-finetune stages", description="Show the stages of a backbone.", allow_abbrev=False)
    parser.add_argument("backbone", help="a timm model name or the dotted path of your own nn.Module")
    parser.add_argument("--input", type=int, metavar="PIXELS", help="side of the picture; default: what the weights expect")
    parser.add_argument("--num_classes", type=int, default=1000, help="classes of the head (default: 1000)")
    options = parser.parse_args(words)
    from finetune.boundaries import stage_table

    say(stage_table(options.backbone, options.num_classes, options.input))


def _weights(words: Sequence[str]) -> None:
    parser = _Parser(
        prog="resnet-finetune weights",
        description="List the weights that are there here and now (cached, hub, bundled, package), and what to type.",
        allow_abbrev=False,
    )
    parser.add_argument("backbone", nargs="?", help="a timm model name; without one, all weights on this machine")
    options = parser.parse_args(words)
    from finetune.weight_list import weights_table

    say(weights_table(options.backbone))


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

    say(clear_kept(options.unused) if options.clear else kept_table(options.unused))


def _predict(words: Sequence[str]) -> None:
    parser = _Parser(
        prog="resnet-finetune predict",
        description="Name the class of pictures: a table with file, label, probability and the runners-up. Pictures that "
        "cannot be read are rows with an error. Interrupted, the same command goes on where it was.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help=_MODEL)
    parser.add_argument("pictures", nargs="*", help="folders (searched to the bottom), files, patterns such as 'new/*.jpg'")
    parser.add_argument("--files_from", metavar="FILE", help="a text file with the path of a picture on each line")
    parser.add_argument("--out", default="predictions.csv", help="where to write: .csv or .jsonl (default: predictions.csv)")
    parser.add_argument("--topk", type=int, default=3, help="how many classes per picture (default: 3)")
    parser.add_argument("--probabilities", action="store_true", help="write the probabilities of all classes, too")
    parser.add_argument("--embed", action="store_true", help="write what the head sees (features) instead of classes")
    _add_predictor_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    options = parser.parse_args(words)
    from finetune.predict import predict_to_file

    predict_to_file(**vars(options))


def _count(text: str) -> int:
    """Return a number of 0 or more; argparse says what is wrong with another."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, found {number}")
    return number


def _add_predictor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tta", default="none", help="test-time augmentation: none, flip, or crops (default: none)")
    parser.add_argument("--temperature", type=float, help="what logits are divided by (default: what calibration stored, or 1)")
    parser.add_argument("--batch_size", type=int, default=64, help="pictures at a time (default: 64)")
    parser.add_argument("--workers", type=_count, help="processes that read pictures (default: from the cores)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")


def _check(words: Sequence[str]) -> None:
    parser = _Parser(
        prog="resnet-finetune check",
        description="Look for all that is wrong with a folder of pictures: files that cannot be read, equal pictures in "
        "several classes or splits, names and links that mislead, classes with too few pictures.",
        epilog="Exit code: 0 if nothing stops training, 1 if there are errors (with --strict, or warnings), 2 if the folder "
        "could not be checked.",
        allow_abbrev=False,
    )
    parser.add_argument("root", metavar="folder", help="a folder of pictures, arranged as for fit --data.root")
    parser.add_argument("--out", metavar="FILE", help="write all findings to a .json or .csv file")
    parser.add_argument("--quick", action="store_true", help="read only headers and ends of files, as fit does by itself")
    parser.add_argument("--strict", action="store_true", help="let warnings count as errors")
    parser.add_argument("--workers", type=_count, help="processes that read pictures (default: from the cores)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    options = parser.parse_args(words)
    from finetune.check import check_to_terminal

    if code := check_to_terminal(**vars(options)):
        raise SystemExit(code)


def _evaluate(words: Sequence[str]) -> None:
    parser = _Parser(
        prog="resnet-finetune evaluate",
        description="Measure a model on labelled pictures: metrics with 95 % intervals, per class, confusion, calibration, "
        "and accuracy where it is confident.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help=_MODEL)
    parser.add_argument(
        "folder", nargs="?", help="<class>/<picture>, also below train, val, test (default: the run's pictures)"
    )
    parser.add_argument("--split", help="train, val or test (default: test where there is one, otherwise val)")
    parser.add_argument("--calibrate", action="store_true", help="fit the temperature on the run's val pictures and store it")
    parser.add_argument("--out", help="the folder to write into (default: RUN/evaluation/FOLDER-SPLIT)")
    parser.add_argument("--threshold", type=float, nargs="+", help="confidences for selective accuracy (default: 0.5 to 0.99)")
    parser.add_argument("--resamples", type=int, default=1000, help="draws of the bootstrap intervals (default: 1000)")
    _add_predictor_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    options = {name: value for name, value in vars(parser.parse_args(words)).items() if value is not None}
    from finetune.evaluate import evaluate

    evaluate(**options)


def _explain(words: Sequence[str]) -> None:
    parser = _Parser(
        prog="resnet-finetune explain",
        description="Draw a row per picture: the picture, where in it the model saw the class (Grad-CAM), and the training "
        "pictures that it finds most alike.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="a run's folder (its best checkpoint), a .ckpt file, or 'last'")
    parser.add_argument("pictures", nargs="*", help="folders, files, patterns")
    parser.add_argument("--mistakes", action="store_true", help="explain the run's worst mistakes instead of named pictures")
    parser.add_argument("--stage", help="the stage to look at (default: the last one; see: resnet-finetune stages BACKBONE)")
    parser.add_argument("--label", help="the class to look for (default: the one that is predicted)")
    parser.add_argument("--neighbours", type=int, help="training images beside each (default: 4, none if they are gone)")
    parser.add_argument("--among", metavar="FOLDER", help="where to look for them (default: the run's training pictures)")
    parser.add_argument("--most", type=int, default=40, help="at most so many pictures (default: 40)")
    parser.add_argument("--out", default="explained", help="the folder to write into (default: explained)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    options = parser.parse_args(words)
    from finetune.explain import explain

    explain(**vars(options))


def _export(words: Sequence[str]) -> None:
    parser = _Parser(
        prog="resnet-finetune export",
        description="Write a checkpoint in a format for use elsewhere, with its class names, input size and a model card. It "
        "is done when export and checkpoint agree on real pictures.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="a run's folder (its best checkpoint), a .ckpt file, or 'last'")
    parser.add_argument("--format", default="onnx", help="onnx, torch_export, or timm (default: onnx)")
    parser.add_argument("--out", help="the folder to write into (default: RUN/export/FORMAT)")
    parser.add_argument("--pictures", nargs="+", default=[], help="what to compare on (default: the run's validation pictures)")
    parser.add_argument("--temperature", type=float, help="what logits are divided by (default: what calibration stored, or 1)")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    options = parser.parse_args(words)
    from finetune.export import export

    export(**vars(options))


def _report(words: Sequence[str]) -> None:
    parser = _Parser(
        prog="resnet-finetune report",
        description="Write what there is to see of a run, which may still be going on or have been killed, into one HTML file; "
        "or compare several runs.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or 'last'; several are compared")
    parser.add_argument("--out", help="where to write (default: report.html in the run's folder, or comparison.html here)")
    options = parser.parse_args(words)
    from finetune.comparison import report

    say(report(options.runs, options.out))


class Verb(NamedTuple):
    """What a verb does, in a few words, and the function that does it with the words behind it."""

    text: str
    run: Callable[[Sequence[str]], None]


VERBS: dict[str, Verb] = {
    "check": Verb("look for all that is wrong with a folder of pictures", _check),
    "evaluate": Verb("measure a model on labelled pictures: metrics with intervals, per class, calibration", _evaluate),
    "predict": Verb("name the class of pictures: a model and a folder -> a table", _predict),
    "explain": Verb("draw where the model looked in pictures, and the training pictures it finds most alike", _explain),
    "export": Verb("write a checkpoint as ONNX, torch.export or a timm folder, and compare the two", _export),
    "report": Verb("look at a run, or compare several: one HTML page", _report),
    "stages": Verb("show the stages of a backbone", _stages),
    "weights": Verb("list the weights that are there for a backbone, here and now", _weights),
    "recipes": Verb("list the recipes, or copy one to edit it", _recipes),
    "reuse": Verb("list what was computed once and is kept for later runs, or clear it", _reuse),
}
"""The verbs that need no trainer."""
