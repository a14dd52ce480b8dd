"""Exports against the checkpoint, run by onnxruntime, torch and timm alone; nothing counts as written before it is compared."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from conftest import save, scrambled

from finetune import CheckpointError, ConfigError, FinetuneModule
from finetune.averaging import WiseFT
from finetune.export import Comparison, export
from finetune.images import read_image
from finetune.main import main
from finetune.predictor import Predictor
from finetune.trained import load_model, open_trained
from finetune.transforms import eval_transform

RUN = "runs/mine/1"
FILES = ["new/a.bmp", "new/b/10.png", "new/b/2.png", "new/b/A.jpg", "new/c.webp"]


def pixels(spec):
    return torch.stack([eval_transform(spec)(read_image(file)) for file in FILES])


def test_onnx_holds_all_that_it_takes(world, capsys):
    main(["export", RUN, "--pictures", "new", "--temperature", "2"])
    folder = Path(RUN, "export", "onnx")
    assert sorted(path.name for path in folder.iterdir()) == [".resnet-finetune", "README.md", "model.onnx"]
    said = capsys.readouterr().out
    assert "compared with the checkpoint on 5 pictures: largest difference" in said
    assert "the same class for 5 of 5 (new)" in said
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    facts = json.loads(session.get_modelmeta().custom_metadata_map["resnet-finetune"])
    model = load_model(RUN)
    assert facts["classes"] == model.class_names
    assert facts["temperature"] == 2
    assert facts["input"]["size"] == 32
    images = pixels(model.input_spec)
    with torch.no_grad():
        features = model.features(images)
        expected = (model.head(features) / 2).softmax(1).numpy()
    for number in (1, 3, 5):  # any batch
        found = session.run(["probabilities", "features"], {"images": images[:number].numpy()})
        np.testing.assert_allclose(found[0], expected[:number], atol=1e-5)
        np.testing.assert_allclose(found[1], features[:number].numpy(), atol=1e-4)
    main(["predict", str(folder / "model.onnx"), "new", "--out", "onnx.csv"])
    main(["predict", RUN, "new", "--temperature", "2", "--out", "checkpoint.csv"])
    main(["predict", str(folder / "model.onnx"), "new", "--embed", "--out", "features.jsonl"])
    labels = [
        [line.rsplit(",", 6)[0] for line in Path(name).read_text().splitlines()] for name in ("onnx.csv", "checkpoint.csv")
    ]
    assert labels[0] == labels[1]
    with pytest.raises(ConfigError, match=r"The temperature of .* is 2 and part of its graph"):
        Predictor(folder / "model.onnx", temperature=1)
    with pytest.raises(ConfigError, match="exists already"):
        export(RUN)
    assert world == Path.cwd()


@pytest.mark.usefixtures("world")
def test_the_example_of_the_card_reads_an_image_as_predict_does(capsys):
    main(["export", RUN, "--pictures", "new"])
    card = Path(RUN, "export", "onnx", "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    example = example.replace("model.onnx", f"{RUN}/export/onnx/model.onnx")
    predictor = Predictor(RUN)
    for file in FILES:
        capsys.readouterr()
        exec(compile(example.replace("image.jpg", file), "card", "exec"), {})
        label, probability = capsys.readouterr().out.rsplit(maxsplit=1)
        expected = predictor([file])[0]
        assert label == expected.labels[0]
        assert float(probability) == pytest.approx(expected.probabilities[0], abs=0.02)  # Pillow rounds between the two passes


@pytest.mark.usefixtures("world")
def test_torch_export_runs_without_this_package():
    folder = export(RUN, "torch_export", out="exported", pictures=["new"])
    assert folder == Path("exported")
    inside = {"resnet-finetune.json": ""}
    program = torch.export.load(folder / "model.pt2", extra_files=inside)
    model = load_model(RUN)
    assert json.loads(inside["resnet-finetune.json"])["classes"] == model.class_names
    images = pixels(model.input_spec)
    with torch.no_grad():
        expected = model(images).softmax(1)
    for number in (1, 5):
        torch.testing.assert_close(program.module()(images[:number])[0], expected[:number], atol=1e-5, rtol=0)
    with pytest.raises(CheckpointError, match=r"loading one runs pickled code"):
        open_trained(folder / "model.pt2")


@pytest.mark.usefixtures("world")
def test_a_timm_folder_is_loaded_by_timm_alone():
    folder = export(RUN, "timm", pictures=["new"])
    alone = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    model = load_model(RUN)
    config = timm.data.resolve_model_data_config(alone)
    assert config["input_size"] == (3, 32, 32)
    assert config["crop_pct"] == 0.9
    assert alone.pretrained_cfg["label_names"] == model.class_names
    images = pixels(model.input_spec)
    mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(alone((images / 255 - mean) / std), model(images), atol=1e-4, rtol=1e-4)
    found, expected = (Predictor(each).probabilities(FILES) for each in (folder, RUN))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(Predictor(folder).features(FILES), Predictor(RUN).features(FILES), atol=1e-4)
    assert asdict(Predictor(folder).trained.input_spec) == asdict(model.input_spec)


@pytest.mark.usefixtures("world")
def test_a_model_that_computes_in_its_own_way(own_class):
    path, model = own_class
    folder = export(path, "torch_export", out="exported", pictures=["new"])
    program = torch.export.load(folder / "model.pt2").module()
    images = pixels(model.input_spec)
    with torch.no_grad():
        torch.testing.assert_close(program(images)[0], model.eval()(images).softmax(1), atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match=r"timm cannot rebuild this model: .* found Doubled"):
        export(path, "timm", out="no", pictures=["new"])
    assert not Path("no").exists()


@pytest.mark.usefixtures("world")
def test_an_export_that_differs_is_not_written(monkeypatch):
    def skewed(self, images):
        return (self.module.head(self.module.features(images)) / self.temperature + torch.tensor([0.1, 0, 0, 0])).softmax(
            1
        ), images

    monkeypatch.setattr("finetune.export.Deployed.forward", skewed)
    with pytest.raises(
        ConfigError, match=r"was not written, as the export does not do what the checkpoint does: compared .* on 5"
    ):
        export(RUN, "torch_export", pictures=["new"])
    assert not Path(RUN, "export", "torch_export").exists()
    assert not list(Path(RUN).rglob("*.part"))


@pytest.mark.usefixtures("world")
def test_mistakes(capsys):
    for words, says in (
        (["--format", "onyx"], "Unknown format 'onyx'. Did you mean 'onnx'?"),
        (["--format", "timm", "--pictures", "nowhere"], "There is no folder nowhere"),
        (["--format", "timm", "--out", "new/a.bmp/x", "--pictures", "new"], "cannot be written"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["export", RUN, *words])
        assert left.value.code == 2
        assert says in capsys.readouterr().err
    Path("bad.onnx").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match="cannot be read as an ONNX model"):
        open_trained("bad.onnx")
    Path("folder").mkdir()
    Path("folder/config.json").write_text("{")
    with pytest.raises(CheckpointError, match="folder cannot be read as a timm model"):
        open_trained("folder")


@pytest.mark.usefixtures("world")
def test_the_card_says_where_it_is_from_and_names_cannot_forge_it(own_class):
    path, _ = own_class
    export(RUN, "timm", pictures=["new"])
    card = Path(RUN, "export", "timm", "README.md").read_text()
    assert card.startswith("---\npipeline_tag: image-classification\nlibrary_name: timm\n")
    for phrase in ("test_resnet", "ant, red", "trained from random values", "32 x 32 pixels", "Not measured", "5 of 5"):
        assert phrase in card
    content = torch.load(path, weights_only=True)
    content["finetune"]["class_names"] = ["<script>a</script>", "# b\n# c", "[d](e)", "f|g"]
    torch.save(content, path)
    export(path, "torch_export", out="exported", pictures=["new"])
    card = Path("exported", "README.md").read_text()
    assert "<script>" not in card
    assert "\n# c" not in card
    assert "\\[d\\](e), f\\|g" in card


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({"lr": 2e-5, "lr_scale": 10.0}, "adamw, rate 2e-05, factor of all stages before the head 10"),
        ({"lr_scale": {"stem": 0.1}, "lr_decay": 0.5}, "adamw, rate 0.01, decay per stage 0.5, factor of stem 0.1"),
        ({"lr_decay": 0.38}, "adamw, rate 0.01, decay per stage 0.38"),
    ],
)
def test_the_card_says_how_the_head_began_which_rates_and_which_average(options, rates):
    names = ["a", "b"]
    model = FinetuneModule(
        "test_resnet", num_classes=2, class_names=names, weights="none", optimizer="adamw", head_init="ridge", **options
    )
    save(scrambled(model), Path("one.ckpt"))
    content = torch.load("one.ckpt", weights_only=True)
    average = WiseFT(0.7)
    content |= {"averaging_state": {}, "callbacks": {average.state_key: average.state_dict()}}
    torch.save(content, "one.ckpt")
    export("one.ckpt", "timm", out="exported", pictures=["new"])
    card = Path("exported", "README.md").read_text().splitlines()
    rows = [line.strip("|").split("|") for line in card if line.startswith("| ") and line.count("|") == 3]
    found = {name.strip(): text.strip() for name, text in rows}
    assert found["optimizer"].replace("\\", "") == rates
    assert (found["head before training"], found["average of weights"].replace("\\", "")) == ("ridge", "wise_ft 0.7")


def test_a_comparison_in_words():
    assert str(Comparison(3, 2e-6, 2)) == (
        "compared with the checkpoint on 3 pictures: largest difference of a probability 2.0e-06, the same class for 2 of 3"
    )
