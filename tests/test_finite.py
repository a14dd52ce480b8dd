"""Models that hold NaN, infinity, or no values, and temperatures that are none: a sentence, never a probability."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from finetune import CheckpointError, ConfigError, FinetuneModule, Predictor, WeightsError
from finetune.export import export
from finetune.finite import require_finite
from finetune.main import main
from finetune.trained import open_trained

RUN = Path("runs/mine/1")
BEST = RUN / "checkpoints" / "best.ckpt"
PLACES = ["head.weight", "backbone.bn1.running_var", "backbone.layer1.0.conv1.weight"]


def change(path, name, value):
    content = torch.load(path, weights_only=True)
    tensor = content["state_dict"][name]
    content["state_dict"][name] = (
        tensor.to("meta") if value == "meta" else tensor.clone().index_fill_(0, torch.tensor(0), value)
    )
    torch.save(content, path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "meta"])
@pytest.mark.parametrize("name", PLACES)
def test_a_checkpoint_with_values_that_are_none_is_refused_by_name(world, name, value):
    change(BEST, name, value)
    with pytest.raises(CheckpointError, match=f"best.ckpt: '{name}' holds"):
        open_trained(RUN)


@pytest.mark.parametrize(
    "words",
    [["predict", str(RUN), "new"], ["evaluate", str(RUN), "new"], ["validate", "--ckpt_path", str(BEST), "--config", "a.yaml"]],
    ids=lambda words: words[0],
)
def test_every_command_says_so(world, capsys, words):
    Path("a.yaml").write_text("model: {class_path: finetune.FinetuneModule, init_args: {backbone: test_resnet}}\n")
    change(BEST, "head.weight", math.nan)
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code != 0
    assert "'head.weight' holds" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_to_start_from(tmp_path, suffix):
    module = FinetuneModule("test_resnet", num_classes=3, weights="none")
    state = {name: tensor.contiguous() for name, tensor in module.backbone.state_dict().items()}
    state["layer2.0.conv1.weight"][1, 2, 0, 0] = math.nan
    path = tmp_path / f"weights.{suffix}"
    safetensors.torch.save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    with pytest.raises(WeightsError, match=r"'layer2.0.conv1.weight' holds 1 of \d+ values that are NaN or infinite"):
        FinetuneModule("test_resnet", num_classes=3, weights=str(path))


def test_what_is_fine():
    mask = torch.tensor([[0.0, -math.inf], [0.0, 0.0]])
    require_finite({"mask": mask, "count": torch.tensor(3), "half": torch.tensor([65504.0]).half(), "text": "nan"}, "a file")
    with pytest.raises(CheckpointError, match="a file: 'mask' holds 1 of 4"):
        require_finite({"mask": mask + 1}, "a file")


@pytest.mark.parametrize("value", [0, -1, -0.5, math.nan, math.inf, "hot", None, [1.0], True])
def test_the_temperature_of_a_timm_folder(world, value):
    folder = export(str(RUN), "timm", pictures=["new"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"resnet_finetune": config["resnet_finetune"] | {"temperature": value}})
    )
    with pytest.raises(CheckpointError, match="expected a finite number above 0"):
        open_trained(folder)


def test_the_weights_of_a_timm_folder(world):
    folder = export(str(RUN), "timm", pictures=["new"])
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state["bn1.running_mean"][3] = math.nan
    safetensors.torch.save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'bn1.running_mean' holds 1 of"):
        open_trained(folder)


@pytest.mark.parametrize("temperature", [0, -1, math.nan, math.inf])
def test_a_temperature_that_is_asked_for(world, temperature):
    with pytest.raises(ConfigError, match="Expected a finite temperature above 0"):
        open_trained(RUN, temperature=temperature)


def test_what_an_exported_graph_computes(world):
    """The weights of an ONNX file are not looked at, what it computes is."""
    predictor = Predictor(RUN)
    files = sorted(str(path) for path in Path("new").rglob("*.png"))
    computed = predictor.trained.probabilities
    predictor.trained.probabilities = lambda images: computed(images).index_fill(0, torch.tensor(len(images) - 1), math.nan)
    with pytest.raises(CheckpointError, match=f"computes NaN or infinity for {files[-1]}, so it says nothing"):
        predictor(files)
    with pytest.raises(CheckpointError, match=f"computes NaN or infinity for {files[-1]}"):
        list(predictor.stream(files, workers=0))
    with pytest.raises(CheckpointError, match="computes NaN or infinity for image 0"):
        predictor(np.zeros((40, 40, 3), np.uint8))
