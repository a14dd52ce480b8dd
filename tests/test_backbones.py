"""Networks by name or dotted path, the input that timm says they expect, and how layers start."""

import copy

import pytest
import timm
import torch
from torch import nn

from finetune.backbones import checkpoint_gradients, create_model, import_path, initialise, input_spec_of
from finetune.boundaries import Boundaries
from finetune.errors import ConfigError
from finetune.stages import split_head
from finetune.transforms import InputSpec


class OwnNet(nn.Module):
    """A user's own network: it knows nothing of timm."""

    def __init__(self, num_classes: int = 4):
        super().__init__()
        self.entry = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.out = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, num_classes))

    def forward(self, x):
        return self.out(self.pool(self.body(self.entry(x))).flatten(1))


def test_own_network_by_class_path():
    model = create_model(f"{__name__}.OwnNet", num_classes=5)
    classifier, stages = split_head(model)
    assert classifier.name == "out.2"
    assert classifier.in_features == 12
    assert [(s.name, len(s.parameters)) for s in stages] == [("entry", 3), ("body", 4), ("neck", 2)]
    assert all(Boundaries(model, stages, 32).check().values())
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 12)


def test_own_function_that_returns_a_timm_resnet():
    model = create_model("torchvision.models.resnet18", num_classes=7)
    classifier, stages = split_head(model)
    assert classifier.name == "fc"
    assert [s.name for s in stages] == ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnt50", "Did you mean 'resnet50'"),
        ("no_module.Net", "cannot be imported"),
        (f"{__name__}.OwnNat", "Did you mean 'OwnNet'"),
    ],
)
def test_unknown_backbone(name, says):
    with pytest.raises(ConfigError, match=says):
        create_model(name, 2)


def test_unknown_backbone_option():
    with pytest.raises(ConfigError, match="drop_rat"):
        create_model("test_resnet", 2, drop_rat=0.1)


def keyword_net(**options):
    """A function that passes its keywords on."""
    return OwnNet(**options)


def fixed_net(width=3):
    return nn.Sequential(nn.Conv2d(3, width, 1), nn.Flatten(), nn.Linear(width, 2))


def test_the_number_of_classes_goes_to_those_who_take_it():
    assert create_model(f"{__name__}.keyword_net", 6).out[2].out_features == 6
    assert create_model(f"{__name__}.fixed_net", 6, width=5)[2].out_features == 2
    assert create_model("test_resnet.r160_in1k", 6).fc.out_features == 6


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./my_net.py", "it is not a dotted path"),
        (".Net", "it is not a dotted path"),
        ("numpy.pi", r"'numpy' has no class or function 'pi'\.$"),
        ("numpy.ndarray", "to be an nn.Module class, or a function of yours that returns one"),
        ("resnet18.none", "could not be created"),
    ],
)
def test_names_that_cannot_be_a_network(name, says):
    with pytest.raises(ConfigError, match=says):
        create_model(name, 2)


def test_a_module_of_the_user_that_fails_shows_its_own_error(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_net.py").write_text("import no_such_library\n")
    with pytest.raises(ConfigError, match="No module named 'no_such_library'"):
        import_path("broken_net.Net")


@pytest.mark.parametrize("name", ["test_resnet", "resnet50.a1_in1k", "resnetv2_50", "efficientnet_b0", "resnet50_clip"])
def test_the_input_is_what_timm_evaluates_with(name):
    model = create_model(name, 2)
    spec = input_spec_of(model)
    config = timm.data.resolve_data_config({}, model=timm.create_model(name))
    assert (3, spec.size, spec.size) == config["input_size"]
    assert (spec.mean, spec.std, spec.crop) == (config["mean"], config["std"], config["crop_pct"])
    assert spec.interpolation == config["interpolation"]


def test_a_network_of_the_user_gets_the_classic_input():
    assert input_spec_of(OwnNet()) == InputSpec(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", 0.875)


def test_kaiming_is_that_of_torch_and_default_changes_nothing():
    torch.manual_seed(0)
    model, head = nn.Sequential(nn.Conv2d(3, 64, 5), nn.BatchNorm2d(64), nn.GroupNorm(4, 64)), nn.Linear(64, 7)
    for layer in model[1:]:
        nn.init.uniform_(layer.weight)
        nn.init.uniform_(layer.bias)
    before = [value.clone() for value in (*model.state_dict().values(), *head.state_dict().values())]
    initialise(model, head, "default", bn_momentum=0.03)
    after = [*model.state_dict().values(), *head.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert (model[1].momentum, model[1].eps) == (0.03, 1e-5)

    torch.manual_seed(1)
    initialise(model, head, "kaiming", bn_eps=1e-3)
    torch.manual_seed(1)
    for layer in (model[0], head):
        expected = nn.init.kaiming_normal_(torch.empty_like(layer.weight), mode="fan_out", nonlinearity="relu")
        assert torch.equal(layer.weight, expected)
        assert not layer.bias.any()
    for layer in model[1:]:
        assert torch.equal(layer.weight, torch.ones(64))
        assert torch.equal(layer.bias, torch.zeros(64))
    assert (model[1].momentum, model[1].eps, model[2].eps) == (0.03, 1e-3, 1e-5)


@pytest.mark.parametrize("name", ["resnet10t", "test_resnet", "mobilenetv2_100", "test_vit"])
def test_checkpointed_gradients_change_neither_gradients_nor_statistics(name):
    torch.manual_seed(0)
    plain = create_model(name, 3).train()
    size = input_spec_of(plain).size if "vit" in name else 64
    spare = copy.deepcopy(plain)
    checkpoint_gradients(spare, size)
    images = torch.rand(4, 3, size, size)
    for network in (plain, spare):
        for _ in range(2):
            network(images).square().sum().backward()
    for (parameter, wanted), found in zip(plain.named_parameters(), spare.parameters(), strict=True):
        torch.testing.assert_close(
            found.grad, wanted.grad, rtol=1e-4, atol=1e-4 * float(wanted.grad.abs().max()), msg=parameter
        )
    for (buffer, wanted), found in zip(plain.named_buffers(), spare.buffers(), strict=True):
        if "num_batches" not in buffer:
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=buffer)


def test_what_was_counted_twice_is_known():
    network = create_model("resnet10t", 3)
    momenta = {name: m.momentum for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    checkpoint_gradients(network, 64)
    changed = {name for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d) and m.momentum != momenta[name]}
    assert "bn1" not in changed  # the stem runs once
    assert "layer2.0.bn1" in changed
    assert network.layer2[0].bn1.momentum == pytest.approx(1 - 0.9**0.5)


def test_a_network_that_cannot_checkpoint_gradients():
    with pytest.raises(ConfigError, match=r"Linear cannot checkpoint gradients: set model\.grad_checkpointing"):
        checkpoint_gradients(nn.Linear(3, 3), 8)
