"""The worked example: its networks are those of the paper, and it runs."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

import finetune
from finetune.main import main

EXAMPLES = Path(finetune.__file__).parent.parent / "examples"


@pytest.fixture
def shortcuts(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("shortcuts")
    sys.modules.pop("shortcuts")


@pytest.mark.parametrize(("name", "layers", "millions"), [("residual20", 20, 0.27), ("residual56", 56, 0.85)])
def test_networks_of_the_paper(shortcuts, name, layers, millions):
    network = getattr(shortcuts, name)(10)  # He et al. 2015, table 6, says how many parameters they have
    weights = [p for p in network.parameters() if p.ndim > 1]
    assert len(weights) == layers
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
    plain = getattr(shortcuts, name.replace("residual", "plain"))(10)
    plain.load_state_dict(network.state_dict())  # the same, but for the additions
    pictures = torch.rand(2, 3, 32, 32)
    assert not torch.allclose(network(pictures), plain(pictures))


def test_it_runs(shortcuts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shortcuts, "NETWORKS", ("residual20", "plain20"))
    monkeypatch.setattr(sys, "argv", ["shortcuts.py", "--epochs", "1", "--size", "8", "--folder", str(tmp_path)])
    shortcuts.main()
    said = capsys.readouterr().out
    assert "stem / head, step 0" in said
    assert all((tmp_path / f"{name}-0" / "gradients.csv").is_file() for name in ("residual20", "plain20"))


@pytest.fixture
def own_adaptation(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("own_adaptation")
    sys.modules.pop("own_adaptation")


def test_a_loss_of_ones_own_is_the_papers(own_adaptation):
    method = own_adaptation.FeatureNorm(weight=0.1, step=2.0)
    source, target = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 6))
    logits = torch.zeros(4, 2), torch.zeros(6, 2)
    loss = method.loss(finetune.DomainBatch(source, target, *logits, torch.zeros(4, dtype=torch.long), 0.5))
    assert loss.item() == pytest.approx(0.1 * 2 * 2.0**2)
    loss.backward()
    expected = -0.1 * 2 * 2.0 * (source / source.norm(dim=1, keepdim=True)) / 4  # outwards, by the step
    assert torch.allclose(source.grad, expected)


def test_a_loss_of_ones_own_runs_from_python_and_by_the_command(own_adaptation, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(EXAMPLES)  # code of the working folder is trusted
    options = ["--backbone", "test_resnet", "--weights", "none", "--epochs", "1", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["own_adaptation.py", *options])
    own_adaptation.main()
    assert "oracle/target_acc" in capsys.readouterr().out
    words = ["--model.adaptation", "own_adaptation.FeatureNorm", "--model.adaptation.weight", "0.1"]
    words += ["--model.backbone", "test_resnet", "--model.weights", "none", "--data.workers", "0", "--data.image_size", "32"]
    main(
        [
            "adapt",
            *words,
            "--trainer.max_epochs",
            "1",
            "--data.steps_per_epoch",
            "2",
            "--run.gradients_every",
            "0",
            "--run.folder",
            str(tmp_path),
        ]
    )
    (run,) = (tmp_path / "domain_adaptation").iterdir()
    model = finetune.AdaptModule.load_from_checkpoint(run / "checkpoints" / "best.ckpt")
    assert isinstance(model.adaptation, own_adaptation.FeatureNorm)
    assert model.adaptation.weight == 0.1
