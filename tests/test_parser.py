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


TABLE = [
    # what is typed, the beginning of the answer, its end
    (["--model.lrr", "3"], "There is no option 'lrr'.", "Did you mean 'lr'?"),
    (["--modl.lr=3"], "There is no option '--modl.lr'.", "Did you mean '--model.lr'?"),
    (["--trainer.max_epoch", "3"], "There is no option '--trainer.max_epoch'.", "Did you mean '--trainer.max_epochs'?"),
    (["--data.batchsize", "3"], "There is no option 'batchsize'.", "Did you mean 'batch_size'?"),
    (["--config", "model.yaml"], "There is no option 'lrr'.", "Did you mean 'lr'?"),
    (["--config", "section.yaml"], "There is no option 'modl.lr'.", "Did you mean 'model.lr'?"),
    (["--config", "trainer.yaml"], "There is no option 'trainer.max_epoch'.", "Did you mean 'trainer.max_epochs'?"),
    (["--model", "finetune.FinetunModule"], "The module 'finetune' has no class 'FinetunModule'.", "'FinetuneModule'?"),
    (["--model", "finetun.FinetuneModule"], "The module 'finetun' cannot be imported. Did you mean 'finetune'?", "installed."),
    (["--model", "my_projct.Mine"], "The module 'my_projct' cannot be imported. Did you mean 'my_project'?", "installed."),
    (["--model.schedule", "cosin"], "schedule: expected one of cosine, flat, step; found 'cosin'.", "Did you mean 'cosine'?"),
    (["--model.lr", "fast"], "lr: expected float; found 'fast'.", ""),
    (["--trainer.max_epochs", "many"], "trainer.max_epochs: expected int or null; found 'many'.", ""),
    (["--seed_everything", "x"], "seed_everything: expected bool or int; found 'x'.", ""),
]


@pytest.fixture(autouse=True)
def _files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_project.py").touch()
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


@pytest.mark.parametrize("words", [["--trainer.max_epochs"], ["--model", "json.JSONDecoder"]], ids=" ".join)
def test_what_needs_no_other_words_keeps_its_own(words):
    with pytest.raises(Caught) as caught:
        Command(Capturing, ["fit", *words])
    message = str(caught.value.args[0])
    assert message
    assert explain(message, []) == message.strip()


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
    assert "Did you mean 'width'?" in capsys.readouterr().err
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
