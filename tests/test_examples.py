"""The worked example: its networks are those of the paper, and it runs."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

import finetune

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
