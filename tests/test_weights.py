"""Weights from files, checkpoints and the cache of the hub: what is used, what is refused, and what the report says."""

import os

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from finetune import hub, weights
from finetune.errors import WeightsError
from finetune.hub import available
from finetune.stages import split_head
from finetune.weight_files import sha256_of
from finetune.weight_report import Report
from finetune.weights import load_weights

pytestmark = pytest.mark.usefixtures("empty_caches")


def make(name="test_resnet", num_classes=3, **options):
    """Build a network the way the project does, and the function that loads weights into it."""
    model = timm.create_model(name, num_classes=num_classes, **options)
    classifier, stages = split_head(model)
    head = nn.Linear(classifier.in_features, num_classes)

    def load(source, **kwargs):
        kwargs = {"backbone_name": name, "classifier": classifier.name, "stages": stages, "backbone_options": options, **kwargs}
        return load_weights(model, head, source=str(source), **kwargs)

    return model.eval(), head, load


def trained(name="test_resnet", num_classes=5, **options):
    """Return a whole network in eval mode whose every tensor differs from how networks start."""
    return scrambled(timm.create_model(name, num_classes=num_classes, **options))


def scrambled(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.2 + 0.1 * (tensor.ndim == 1))
    return model.eval()


def snapshot(*modules):
    return [tensor.clone() for module in modules for tensor in module.state_dict().values()]


def same(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.fixture
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def cache(name, state_dict, folder, filename="model.safetensors"):
    """Lay a file out the way huggingface_hub keeps it."""
    repository = timm.models.get_pretrained_cfg(name).hf_hub_id
    root = folder / "hub" / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "snapshots" / "abc").mkdir(parents=True)
    (root / "refs" / "main").write_text("abc")
    path = root / "snapshots" / "abc" / filename
    save_file(state_dict, path) if filename.endswith(".safetensors") else torch.save(state_dict, path)
    return repository, path


# -- files that fit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_file_gives_the_same_logits_as_the_network_it_came_from(tmp_path, images, suffix):
    origin, path = trained(), tmp_path / f"w{suffix}"
    save_file(origin.state_dict(), path) if suffix == ".safetensors" else torch.save(origin.state_dict(), path)
    backbone, head, load = make(num_classes=5)
    report = load(path)
    assert torch.equal(head(backbone(images)), origin(images))
    assert (report.source, report.location, report.head) == ("file", str(path), "from the weights")
    assert report.kept == sum("num_batches" not in name for name in origin.state_dict()) - 2
    assert report.dropped == report.missing == report.reshaped == report.untrained == ()
    assert len(report.sha256) == 64


def test_old_format_without_counters(tmp_path, images):
    origin = trained()
    state = {name: t for name, t in origin.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    backbone, head, load = make(num_classes=5)
    assert load(tmp_path / "w.pth").missing == ()
    assert torch.equal(head(backbone(images)), origin(images))


def test_torchvision_names_are_those_of_timm(tmp_path, images):
    origin = scrambled(torchvision.models.resnet18(weights=None, num_classes=7))
    torch.save(origin.state_dict(), tmp_path / "tv.pth")
    backbone, head, load = make("resnet18", num_classes=7)
    load(tmp_path / "tv.pth")
    torch.testing.assert_close(head(backbone(images)), origin(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "backbone.", "module._orig_mod.", "module.model.backbone."]
)
def test_wrappers_are_stripped(tmp_path, images, prefix):
    origin = trained()
    torch.save({f"{prefix}{name}": t for name, t in origin.state_dict().items()}, tmp_path / "w.pth")
    backbone, head, load = make(num_classes=5)
    assert load(tmp_path / "w.pth").head == "from the weights"
    assert torch.equal(head(backbone(images)), origin(images))


def test_only_the_backbone_wrapped(tmp_path, images):
    origin = trained()
    state = {n.replace("fc.", "head.") if n.startswith("fc.") else f"backbone.{n}": t for n, t in origin.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    backbone, head, load = make(num_classes=5)
    assert load(tmp_path / "w.pth").head == "from the weights"
    assert torch.equal(head(backbone(images)), origin(images))


def test_own_names_that_look_like_a_wrapper_are_kept():
    found = {"model.weight": torch.zeros(1), "model.bias": torch.zeros(1)}
    assert list(weights._unwrapped(found, found)) == list(found)


def test_a_wrapper_around_some_of_the_names_is_not_stripped():
    found = {"a": torch.zeros(1), "module.b": torch.zeros(1)}
    assert list(weights._unwrapped(found, ["a", "b"])) == list(found)


def test_names_that_would_collide_are_not_stripped():
    found = {"module.a": torch.zeros(1), "module.b": torch.zeros(1), "b": torch.zeros(1)}
    assert list(weights._unwrapped(found, ["a"])) == list(found)


# -- reshaping --------------------------------------------------------------------------------------------------------------


def test_grey_stem_sees_grey_pictures_as_before(tmp_path, images):
    origin = trained(in_chans=1)
    torch.save(origin.state_dict(), tmp_path / "grey.pth")
    backbone, head, load = make(num_classes=5)
    report = load(tmp_path / "grey.pth")
    assert report.reshaped == ("conv1.0.weight",)
    grey = images[:, :1]
    torch.testing.assert_close(head(backbone(grey.expand(-1, 3, -1, -1))), origin(grey), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_stem_for_other_pictures_is_that_of_timm(channels):
    weight = torch.rand(4, 3, 2, 2)
    torch.testing.assert_close(weights._adapt_channels(weight, channels), timm.models.adapt_input_conv(channels, weight))


def test_convolutional_classifier_fills_a_linear_head(tmp_path):
    origin = trained()
    state = origin.state_dict()
    state["fc.weight"] = state["fc.weight"][:, :, None, None]
    torch.save(state, tmp_path / "w.pth")
    _, head, load = make(num_classes=5)
    assert load(tmp_path / "w.pth").reshaped == ("fc.weight",)
    assert torch.equal(head.weight, origin.fc.weight)


def test_half_precision_is_widened(tmp_path):
    torch.save({n: t.half() for n, t in trained().state_dict().items()}, tmp_path / "w.pth")
    backbone, _, load = make(num_classes=5)
    load(tmp_path / "w.pth")
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}


# -- the head ---------------------------------------------------------------------------------------------------------------


def test_head_of_ten_classes_is_not_lost(tmp_path):
    """Trap 38: timm's own route drops a head that is not the 1000 of its table."""
    origin = trained(num_classes=10)
    torch.save(origin.state_dict(), tmp_path / "w.pth")
    _, head, load = make(num_classes=10)
    report = load(tmp_path / "w.pth")
    assert report.head == "from the weights"
    assert torch.equal(head.weight, origin.fc.weight)
    assert torch.equal(head.bias, origin.fc.bias)


def test_head_of_other_size_is_dropped_and_named(tmp_path):
    torch.save(trained(num_classes=5).state_dict(), tmp_path / "w.pth")
    _, head, load = make(num_classes=3)
    before = snapshot(head)
    report = load(tmp_path / "w.pth")
    assert (report.head, report.dropped) == ("new", ("fc.weight", "fc.bias"))
    assert "dropped 2: fc.weight, fc.bias" in report.summary()
    assert same(before, snapshot(head))


# -- files that do not fit --------------------------------------------------------------------------------------------------


def test_missing_stage_is_refused_and_partial_accepts_it(tmp_path):
    origin = trained("resnet10t")
    torch.save({n: t for n, t in origin.state_dict().items() if not n.startswith("layer4")}, tmp_path / "w.pth")
    backbone, head, load = make("resnet10t", num_classes=5)
    before = snapshot(backbone, head)
    with pytest.raises(WeightsError, match=r"(?s)15 missing: layer4 \(15\).*--model.partial_weights true"):
        load(tmp_path / "w.pth")
    assert same(before, snapshot(backbone, head)), "a refused file must not touch the network"
    report = load(tmp_path / "w.pth", partial=True)
    assert "missing 15: layer4 (15)" in report.summary()
    assert "layer4 should train" in report.summary()
    assert report.untrained == ("layer4",)
    assert torch.equal(backbone.layer3[0].conv1.weight, origin.layer3[0].conv1.weight)
    assert not torch.equal(backbone.layer4[0].conv1.weight, origin.layer4[0].conv1.weight)


def test_everything_that_does_not_fit_is_listed(tmp_path):
    state = trained().state_dict()
    state["layer2.0.conv1.weight"] = state["layer2.0.conv1.weight"][:, :2]
    state["projector.weight"] = torch.zeros(2)
    del state["bn1.running_mean"]
    torch.save(state, tmp_path / "w.pth")
    _, _, load = make()
    with pytest.raises(WeightsError) as caught:
        load(tmp_path / "w.pth")
    message = str(caught.value)
    assert "1 missing: bn1.running_mean" in message
    assert "1 unexpected: projector.weight" in message
    assert "layer2.0.conv1.weight [" in message
    report = load(tmp_path / "w.pth", partial=True)
    assert set(report.missing) == {"bn1.running_mean", "layer2.0.conv1.weight"}
    assert {"projector.weight", "layer2.0.conv1.weight"} <= set(report.dropped)
    assert report.untrained == ("stem", "layer2")


def test_a_tensor_too_many_is_refused(tmp_path):
    torch.save({**trained().state_dict(), "projector.weight": torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"1 unexpected: projector\.weight"):
        make()[2](tmp_path / "w.pth")


@pytest.mark.parametrize("partial", [False, True])
def test_nothing_fits(tmp_path, partial):
    torch.save({"encoder.a": torch.zeros(1), "encoder.b": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"None of the 2 tensors.*conv1.*encoder\.a, encoder\.b"):
        make()[2](tmp_path / "w.pth", partial=partial)


def test_integers_do_not_fill_weights(tmp_path):
    state = trained().state_dict()
    state["bn1.weight"] = state["bn1.weight"].to(torch.int8)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"of torch\.int8"):
        make()[2](tmp_path / "w.pth")


# -- files that cannot be read ----------------------------------------------------------------------------------------------


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_file_is_not_run_and_the_network_stays_as_it_was(tmp_path):
    torch.save({**trained(num_classes=3).state_dict(), "fc.weight": Harmful(str(tmp_path / "proof"))}, tmp_path / "w.pth")
    backbone, head, load = make()
    before = snapshot(backbone, head)
    with pytest.raises(WeightsError, match=r"would run code \((posix|nt)\.mkdir\)"):
        load(tmp_path / "w.pth", partial=True)
    assert same(before, snapshot(backbone, head))
    assert not (tmp_path / "proof").exists()


def test_a_misspelt_source_names_the_nearest_word():
    with pytest.raises(WeightsError, match="Did you mean 'auto'"):
        make()[2]("atuo")


# -- checkpoints of this toolkit --------------------------------------------------------------------------------------------


def checkpoint(path, origin, classes=None, **hyper_parameters):
    state = {(f"head.{n[3:]}" if n.startswith("fc.") else f"backbone.{n}"): t for n, t in origin.state_dict().items()}
    content = {"state_dict": {**state, "loss.pos_weight": torch.ones(3)}, "hyper_parameters": hyper_parameters}
    torch.save({**content, "epoch": 2, **({"finetune": {"class_names": classes}} if classes else {})}, path)
    return path


@pytest.mark.parametrize(
    ("mine", "theirs", "head_is"),
    [
        (["a", "b", "c"], ["a", "b", "c"], "from the weights"),
        (["a", "b", "c"], ["a", "c", "b"], "new"),
        (None, ["a", "b", "c"], "from the weights"),
        (["a", "b", "c"], None, "from the weights"),
    ],
)
def test_checkpoint_gives_its_head_to_the_same_classes(tmp_path, images, mine, theirs, head_is):
    origin = trained(num_classes=3)
    backbone, head, load = make(num_classes=3)
    report = load(checkpoint(tmp_path / "best.ckpt", origin, theirs, backbone="test_resnet"), class_names=mine)
    assert (report.source, report.head) == ("checkpoint", head_is)
    assert torch.equal(head(backbone(images)), origin(images)) == (head_is != "new")
    assert ("head.weight" in report.dropped) == (head_is == "new")
    assert "loss.pos_weight" in report.dropped


def test_checkpoint_of_another_backbone(tmp_path):
    path = checkpoint(tmp_path / "best.ckpt", trained(), backbone="resnet18")
    with pytest.raises(WeightsError, match=r"holds a 'resnet18', but the model is a 'test_resnet'"):
        make()[2](path, partial=True)


def test_checkpoint_of_another_project_is_a_file(tmp_path):
    origin = trained(num_classes=3)
    content = {
        "state_dict": {f"model.{n}": t for n, t in origin.state_dict().items()},
        "hyper_parameters": {"backbone": "mine"},
    }
    torch.save(content, tmp_path / "other.ckpt")
    report = make()[2](tmp_path / "other.ckpt")
    assert (report.source, report.head) == ("file", "from the weights")


# -- the hub ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filename", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("source", ["auto", "hub"])
@pytest.mark.usefixtures("no_network")
def test_cached_weights_need_no_network(tmp_path, images, source, filename):
    origin = trained(num_classes=1000)
    repository, path = cache("test_resnet", origin.state_dict(), tmp_path, filename)
    backbone, head, load = make(num_classes=3)
    state = torch.get_rng_state()
    report = load(source)
    assert torch.equal(state, torch.get_rng_state()), "the run's random numbers must not depend on the source"
    assert (report.source, report.location, report.head) == ("hub", repository, "new")
    assert (report.missing, report.dropped) == ((), ("fc.weight", "fc.bias"))
    assert torch.equal(backbone(images), origin.forward_head(origin.forward_features(images), pre_logits=True))
    assert available("test_resnet")
    assert report.sha256 == sha256_of(path)
    assert head.out_features == 3


@pytest.mark.usefixtures("no_network")
def test_cached_weights_pass_through_the_filter_of_timm(tmp_path):
    """A vision transformer at another input size: timm resamples its position embedding, a plain copy could not."""
    name = "test_vit"
    origin = trained(name, num_classes=1000)
    cache(name, origin.state_dict(), tmp_path)
    backbone, _, load = make(name, img_size=64)
    assert load("auto").missing == ()
    assert backbone.pos_embed.shape != origin.pos_embed.shape
    assert backbone.pos_embed.min() > 0


@pytest.mark.usefixtures("no_network")
def test_weights_in_the_cache_of_torch(tmp_path, monkeypatch):
    url = "https://example.invalid/releases/test-0123abcd.pth"
    cfg = timm.models.get_pretrained_cfg("test_resnet")
    cfg.hf_hub_id, cfg.url = None, url
    monkeypatch.setattr(hub, "get_pretrained_cfg", lambda _: cfg)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(trained(num_classes=1000).state_dict(), folder / "test-0123abcd.pth")
    report = make(num_classes=1000)[2]("auto")
    assert (report.location, report.head) == (url, "from the weights")


@pytest.mark.usefixtures("no_network")
def test_damaged_file_in_the_cache(tmp_path):
    _, path = cache("test_resnet", trained(num_classes=1000).state_dict(), tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="delete it"):
        make()[2]("auto")


# -- the report -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_network")
def test_none_leaves_the_network_as_it_is():
    backbone, head, load = make()
    before = snapshot(backbone, head)
    report = load("none")
    assert same(before, snapshot(backbone, head))
    assert (report.source, report.sha256, report.kept, report.head) == ("none", None, 0, "new")
    assert report.untrained == ("stem", "layer1", "layer2", "layer3", "layer4")
    assert "random" in report.summary()


def test_report_fits_into_a_checkpoint(tmp_path):
    torch.save({n: t for n, t in trained().state_dict().items() if not n.startswith("layer4")}, tmp_path / "w.pth")
    plain = make()[2](tmp_path / "w.pth", partial=True).as_dict()
    assert {type(value) for value in plain.values()} <= {str, int, list, type(None)}
    torch.save(plain, tmp_path / "report.pth")
    assert torch.load(tmp_path / "report.pth", weights_only=True) == plain
    assert Report.from_dict(plain).as_dict() == plain
    older = {name: value for name, value in plain.items() if name not in ("input", "note")}  # as checkpoints have it so far
    assert Report.from_dict(older).as_dict() == plain
