"""A dotted path counts by what it names: a class, or a function of the package it names; never by how it is written."""

import sys
import textwrap

import pytest
from torch import nn

from finetune.backbones import create_model, import_path
from finetune.errors import ConfigError
from finetune.main import main
from finetune.trusted_code import guarding, require_all_trusted, trusted_here

PROJECT = """
import functools
import operator
import os
import subprocess
from collections import OrderedDict
from pathlib import Path
from subprocess import Popen, getoutput

import joblib
import timm
import torch
from joblib import load
from timm.models import load_checkpoint
from timm.models.resnet import ResNet, resnet18
from torch import nn
from torch.nn import Linear, functional
from torchvision.models import alexnet

from finetune import FinetuneModule
from finetune.main import main
from finetune.training import run

called = []


def net(num_classes=2):
    called.append("net")
    return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))


def start(args=None, **options) -> None:
    called.append("start")


def text(num_classes=2):
    return "text"


class Outer:
    class Net(nn.Linear):
        def __init__(self, num_classes=2):
            super().__init__(3, num_classes)

    def build(self, num_classes=2):
        called.append("build")
        return net(num_classes)

    __call__ = build


instance = Outer()
method = instance.build
bound = functools.partial(net)
cached = functools.cache(net)
call = operator.methodcaller("x")
number = 3
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "own_project.py").write_text(PROJECT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with guarding():
        import_path("own_project.net")
        yield sys.modules["own_project"]
    sys.modules.pop("own_project")


@pytest.mark.parametrize(("name", "kind"), [("net", nn.Sequential), ("Outer.Net", nn.Linear), ("alexnet", nn.Module)])
def test_networks_of_ones_own_are_made(project, name, kind):
    assert isinstance(create_model(f"own_project.{name}", 7), kind)


@pytest.mark.parametrize(
    "name",
    [
        *("main", "run", "start", "FinetuneModule", "Popen", "getoutput", "load", "load_checkpoint", "OrderedDict", "Path"),
        *("os.system", "subprocess.Popen", "joblib.load", "torch.load", "torch.hub.load", "timm.create_model", "os.path.join"),
        *("nn.Linear", "functional.relu", "functional", "resnet18", "Outer", "Outer.build", "instance", "instance.build"),
        *("method", "bound", "cached", "call", "number", "__dict__", "__builtins__", "net.__call__", "net.__globals__.get"),
        *("Outer.__subclasses__", "Outer.Net.load_state_dict", "__loader__.load_module", "called.append", "__spec__"),
    ],
)
def test_what_a_module_has_beside_networks_is_not_called(project, name):
    project.called.clear()
    with pytest.raises(ConfigError):
        create_model(f"own_project.{name}", 2)
    assert not project.called


@pytest.mark.parametrize(
    "path",
    [
        *("finetune.main.main", "finetune.training.run", "finetune.FinetuneModule", "finetune.Predictor", "torch.load"),
        *(
            "torch.hub.load",
            "torch.jit.load",
            "torch.utils.data.DataLoader",
            "timm.models.load_checkpoint",
            "lightning.Trainer",
        ),
        *("torchvision.models.get_model", "torchmetrics.Accuracy", "torchmetrics.classification.MulticlassAccuracy"),
        *("lightning.LightningModule", "torch.fx.GraphModule", "torch.nn.modules.module.torch.load", "os.system"),
        *("torch.utils.data.dataloader.os.system", "lightning.pytorch.cli.os.system", "torch.nn.init.xavier_uniform_"),
    ],
)
def test_a_library_gives_its_networks_and_nothing_else(path):
    for guard in (True, False):
        with pytest.raises(ConfigError), guarding() if guard else pytest.MonkeyPatch.context():
            create_model(path, 2)


def test_networks_of_libraries_are_made():
    assert isinstance(create_model("torchvision.models.alexnet", 3), nn.Module)
    assert isinstance(create_model("torch.nn.Linear", 3, in_features=2, out_features=4), nn.Linear)


def test_what_a_function_returned_is_looked_at(project):
    with pytest.raises(ConfigError, match="found str"):
        create_model("own_project.text", 2)


def test_another_name_of_a_module_is_not_followed(project, monkeypatch):
    monkeypatch.setitem(sys.modules, "own_project.os", sys.modules["os"])
    with pytest.raises(ConfigError, match=r"another name of the module 'os'"):
        create_model("own_project.os.system", 2)


def test_functions_in_a_configuration(project):
    require_all_trusted({"trainer": {"callbacks": [{"init_args": {"on_fit_start": project.net, "act": nn.functional.relu}}]}})
    for function in (main, project.main, project.run, project.getoutput, project.os.system, project.load):
        with pytest.raises(ConfigError):
            require_all_trusted({"trainer": {"callbacks": [{"init_args": {"on_fit_start": function}}]}})


def test_the_command_does_not_run_within_itself():
    with guarding(["fit"]), pytest.raises(ConfigError, match="called while it was running"):
        main(["stages", "--backbone", "joblib.load"])


def test_only_the_outermost_arguments_are_typed():
    with guarding(["fit", "--model.backbone", "mine.Net"]):
        with guarding(["fit", "--model.backbone", "theirs.load"], ["named"]):
            assert trusted_here() == ["mine", "named"]
        assert trusted_here() == ["mine"]


@pytest.mark.filterwarnings("ignore:.*no pretrained weights.*")
@pytest.mark.parametrize("path", ["train.main", "train.start", "train.shell"])
def test_a_checkpoint_and_a_configuration_run_nothing(tmp_path, monkeypatch, path, capsys):
    source = """
        import os
        from finetune.main import main

        def start(args):
            main(args)

        class Shell:
            def __call__(self, args):
                os.system("touch hacked")

        shell = Shell()
        """
    (tmp_path / "train.py").write_text(textwrap.dedent(source))
    (tmp_path / "evil.py").write_text("open('hacked', 'w').close()")
    monkeypatch.chdir(tmp_path)
    nested = ["stages", "evil.Net"]
    (tmp_path / "evil.yaml").write_text(
        f"model: {{init_args: {{backbone: {path}, backbone_args: {{args: {nested}}}, weights: none}}}}\n"
        "data: {init_args: {workers: 0}}"
    )
    with pytest.raises(SystemExit):
        main(["fit", "--config", "evil.yaml", "--trainer.fast_dev_run", "true"])
    assert not (tmp_path / "hacked").exists()
    assert "error: " in capsys.readouterr().err
    for name in ("train", "evil"):
        sys.modules.pop(name, None)
