"""The help of `fit` against the signatures and docstrings of the classes that it speaks of."""

import inspect
import re

import lightning as L
import pytest

from finetune import AdaptDataModule, FinetuneModule, FolderDataModule
from finetune.main import main
from finetune.usage import help_text


def explained(kind):
    """Return what a docstring says of each argument, without line breaks."""
    args = inspect.getdoc(kind).partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.split(r"\n    (?=\w+: )", "\n" + args.rstrip())
    return {name: " ".join(text.split()) for name, _, text in (entry.partition(": ") for entry in entries if entry.strip())}


@pytest.mark.parametrize(("section", "kind"), [("model", FinetuneModule), ("data", FolderDataModule)])
def test_every_option_is_explained_and_has_its_default(section, kind):
    said = {}
    for entry in re.split(r"\n  (?=--)", help_text("fit")):
        said[entry.split()[0].rstrip(",")] = " ".join(entry.split())
    from_data = {"num_classes", "class_names"}
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if name not in {"self", *from_data}
    }
    assert len(parameters) >= 10
    for name, parameter in parameters.items():
        entry = said[f"--{section}.{name}"]
        assert explained(kind)[name].replace(" ", "") in entry.replace(" ", ""), name  # lines are broken at hyphens too
        if isinstance(parameter.default, str | float) and not isinstance(parameter.default, bool):
            assert f"default: {parameter.default}" in entry, entry
    assert not {f"--model.{name}" for name in from_data} & set(said)


def test_adapt_explains_what_it_takes():
    text = help_text("adapt")
    names = [f"--data.{name}" for name in inspect.signature(AdaptDataModule).parameters]
    for option in [*names, "--model.adaptation", "--model.joint_bn", "--model.bottleneck", "--compare"]:
        assert f"{option}" in text


def test_the_trainers_other_options_are_behind_another_word(capsys):
    short = set(re.findall(r"--trainer\.(\w+)", help_text("test")))
    signature = set(inspect.signature(L.Trainer.__init__).parameters)
    assert {"max_epochs", "devices", "precision"} <= short < signature
    with pytest.raises(SystemExit):
        main(["test", "--help_all"])
    assert set(re.findall(r"--trainer\.(\w+)", capsys.readouterr().out)) >= signature - {"self"}
