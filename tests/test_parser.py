"""Messages that jsonargparse really gives -> the sentences that users read."""

from typing import Optional, Union

import lightning as L
import pytest
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from finetune.errors import DataError
from finetune.parser import Parser, explain


class Caught(Exception):  # noqa: N818
    """What the parser wanted to say, and to whom."""


class Capturing(LightningArgumentParser):
    """A parser that hands its message on instead of printing it."""

    def error(self, message, ex=None):
        raise Caught(message, self)


class Command(LightningCLI):
    """A command with our classes, none of which is ever made here."""

    def __init__(self, parser_class, words):
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=parser_class,
            parser_kwargs={
                "prog": "resnet-finetune",
                "allow_abbrev": False,
                **{verb: {"allow_abbrev": False} for verb in ("fit", "validate", "test")},
            },
            auto_configure_optimizers=False,
            args=words,
        )

    def add_arguments_to_parser(self, parser):
        parser.set_defaults({"model": {"class_path": "finetune.FinetuneModule"}})
        parser.set_defaults({"data": {"class_path": "finetune.FolderDataModule"}})
        parser.link_arguments("data", "model.init_args.num_classes", compute_fn=len, apply_on="instantiate")

    def parse_arguments(self, parser, args):
        self.config = parser.parse_args(args)  # Lightning warns where this process has words of its own

    def before_instantiate_classes(self):
        raise AssertionError("this was no mistake")


ADAPT = ["--model", "finetune.AdaptModule"]
TABLE = [
    # what is typed, the beginning of the answer, its end
    (["--model.lrr", "3"], "There is no option 'model.lrr'.", "Did you mean 'model.lr'?"),
    (["--modl.lr=3"], "There is no option '--modl.lr'.", "Did you mean '--model.lr'?"),
    (["--trainer.max_epoch", "3"], "There is no option '--trainer.max_epoch'.", "Did you mean '--trainer.max_epochs'?"),
    (["--data.batchsize", "3"], "There is no option 'data.batchsize'.", "Did you mean 'data.batch_size'?"),
    (["--config", "model.yaml"], "There is no option 'model.lrr'.", "Did you mean 'model.lr'?"),
    (["--config", "section.yaml"], "There is no option 'modl.lr'.", "Did you mean 'model.lr'?"),
    (["--config", "trainer.yaml"], "There is no option 'trainer.max_epoch'.", "Did you mean 'trainer.max_epochs'?"),
    (["--model", "finetune.FinetunModule"], "The module 'finetune' has no class 'FinetunModule'.", "'FinetuneModule'?"),
    (["--model", "finetun.FinetuneModule"], "The module 'finetun' cannot be imported. Did you mean 'finetune'?", "installed."),
    (["--model", "my_projct.Mine"], "The module 'my_projct' cannot be imported. Did you mean 'my_project'?", "installed."),
    (
        ["--model.schedule", "cosin"],
        "model.schedule: expected one of cosine, flat, step; found 'cosin'.",
        "Did you mean 'cosine'?",
    ),
    (["--model.lr", "fast"], "model.lr: expected float; found 'fast'.", ""),
    (["--config", "value.yaml"], "data.batch_size: expected int; found 'many'.", ""),
    (["--model.lr_scale", "x"], "model.lr_scale: expected float or a mapping such as {name: float} or null; found 'x'.", ""),
    (["--model.lr_scale.stem", "x"], "model.lr_scale: expected float or a mapping such as", "found 'stem: x'."),
    (["--model.optimizer_args.foo"], "The option --model.optimizer_args.foo needs a value.", ""),
    (
        ["--model", "finetune.AdaptModule", "--model.adaptation", "MCC", "--model.adaptation.temperature", "x"],
        "model.adaptation.temperature: ",
        "",
    ),
    (
        ["--trainer.callbacks", "EarlyStopping"],
        "The class of --trainer.callbacks needs a value for: monitor.",
        "monitor VALUE.",
    ),
    (["--model", "resnet50"], "model: expected the class of a module, as in MODULE.CLASS;", "'--model.backbone resnet50'?"),
    (["--data", "photos"], "data: expected the class of a data module, as in MODULE.CLASS;", "'--data.root photos'?"),
    (["--model", "json.JSONDecoder"], "model: expected the class of a module, as in MODULE.CLASS; found", "JSONDecoder'."),
    (["--trainer.max_epochs"], "The option --trainer.max_epochs needs a value.", ""),
    (["--lr", "0.1"], "There is no option '--lr'.", "Did you mean '--model.lr'?"),
    (["--epochs", "3"], "There is no option '--epochs'.", "Did you mean '--trainer.max_epochs'?"),
    (["photos/"], "'photos/' belongs to no option. To train on a folder: --data.root photos/", ""),
    (["my/run/"], "'my/run/' belongs to no option. To resume a run: --ckpt_path my/run/", ""),
    (["small"], "'small' belongs to no option. To use a recipe: --config small", ""),
    (["x.ckpt"], "'x.ckpt' belongs to no option. To resume a run: --ckpt_path x.ckpt;", "--model.weights x.ckpt"),
    (["--trainer.max_epochs", "many"], "trainer.max_epochs: expected int or null; found 'many'.", ""),
    (["--seed_everything", "x"], "seed_everything: expected bool or int; found 'x'.", ""),
]


@pytest.fixture(autouse=True)
def _files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_project.py").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "my" / "run").mkdir(parents=True)
    (tmp_path / "my" / "run" / "config.yaml").touch()
    (tmp_path / "value.yaml").write_text("data:\n  class_path: finetune.FolderDataModule\n  init_args:\n    batch_size: many\n")
    (tmp_path / "section.yaml").write_text("modl:\n  lr: 0.1\n")
    (tmp_path / "trainer.yaml").write_text("trainer:\n  max_epoch: 3\n")
    (tmp_path / "model.yaml").write_text("model:\n  class_path: finetune.FinetuneModule\n  init_args:\n    lrr: 0.1\n")


@pytest.mark.parametrize(("words", "begins", "ends"), TABLE, ids=[" ".join(row[0]) for row in TABLE])
def test_the_command_says_it_in_a_sentence(capsys, words, begins, ends):
    with pytest.raises(SystemExit) as left:
        Command(Parser, ["fit", *words])
    assert left.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"error: {begins}")
    assert said[0].endswith(ends)
    assert said[1:] == ["For all options: resnet-finetune fit --help"]


def test_a_message_that_is_not_known_stays_as_it_is():
    assert explain("  The parser fails in a new way. ", []) == "The parser fails in a new way."


def test_a_verb_that_is_not_there():
    with pytest.raises(Caught) as caught:
        Command(Capturing, ["validat"])
    assert explain(str(caught.value.args[0]), []) == "There is no command 'validat'. Did you mean 'validate'?"


def test_the_options_of_a_class_are_listed_with_those_of_its_bases(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "wide_project.py").write_text(
        "from finetune import FinetuneModule\n\nclass Wide(FinetuneModule):\n"
        "    def __init__(self, width: int = 3, **options):\n        super().__init__(**options)\n"
    )
    with pytest.raises(SystemExit):
        Command(Parser, ["fit", "--model", "wide_project.Wide", "--model.widht", "4"])
    assert "Did you mean 'model.width'?" in capsys.readouterr().err
    message = "Problem with given class_path 'wide_project.Wide':\n  Option 'widht' is not accepted"
    assert explain(message).startswith(
        "Wide has no option 'widht'. Did you mean 'width'? It has: width, backbone, num_classes, "
    )


def test_an_error_of_ours_inside_the_parsers_is_passed_on():
    try:
        raise ValueError("jsonargparse says") from DataError("no picture")
    except ValueError as error:
        with pytest.raises(DataError, match="no picture"):
            Parser().error("Parser key: much text", error)


# ---------------------------------------------------------------------------------------------- 1 is one batch, 1.0 is all

NUMBERS = ["limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches"]
NUMBERS += ["val_check_interval"]


class Counted:
    """A class of somebody's, whose annotations have float in front."""

    def __init__(self, share: Union[float, int] = 0.5, part: Optional[Union[float, int]] = None):  # noqa: UP007, UP045
        self.share, self.part = share, part


@pytest.fixture
def numbers():
    parser = Parser()
    parser.add_lightning_class_args(L.Trainer, "trainer")
    parser.add_subclass_arguments(Counted, "mine")
    parser.add_argument("--config", action="config")
    return parser


@pytest.mark.parametrize(("text", "kind"), [("1", int), ("1.0", float), ("0", int), ("0.5", float), ("2", int)])
def test_a_number_keeps_the_kind_it_was_typed_with(tmp_path, numbers, text, kind):
    typed = [word for name in NUMBERS for word in (f"--trainer.{name}", text)]
    typed += ["--mine", f"{__name__}.Counted", "--mine.share", text, "--mine.part", text]
    (tmp_path / "typed.yaml").write_text(
        "trainer:\n"
        + "".join(f"  {name}: {text}\n" for name in NUMBERS)
        + f"mine:\n  class_path: {__name__}.Counted\n  init_args:\n    share: {text}\n    part: {text}\n"
    )
    found = [numbers.parse_args(typed), numbers.parse_args(["--config", "typed.yaml"])]
    (tmp_path / "saved.yaml").write_text(numbers.dump(found[0], skip_none=False))  # as a run keeps its configuration
    found.append(numbers.parse_args(["--config", "saved.yaml"]))
    for options in found:
        values = {name: options.trainer[name] for name in NUMBERS} | dict(options.mine.init_args)
        assert {name: (type(value), value) for name, value in values.items()} == dict.fromkeys(
            values, (kind, kind(float(text)))
        )
