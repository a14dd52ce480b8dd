"""Stored activations are those of a fresh pass, whatever one thing has changed; what does not matter still finds them.

Twice over: by the key of the store, and, where the key is made blind, by the comparison with a few fresh rows.
"""

import copy
import importlib
import os
import random
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from finetune import FinetuneModule
from finetune.decoded import keep_decoded
from finetune.folders import Picture, scan
from finetune.loading import PictureDataset
from finetune.reuse import Reuse, activations, frozen_rows
from finetune.transforms import InputSpec, eval_transform, train_transform

COUNT = 6
NET = """
import os

import torch
from torch import nn
from torch.nn import functional as F

SCALE = 1.5


def bend(x):
    return F.relu(x) * SCALE


class Net(nn.Module):
    power = 1

    def __init__(self, num_classes: int = 1000):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.slope = 0.1
        self.shift = torch.tensor(0.25)
        self.act = F.relu
        self.own = lambda x, by=0.5: x * by
        self.sizes = {"add": [0.0, 1.0]}
        self._gain = 1.0
        self.register_buffer("tilt", torch.tensor(0.5), persistent=False)
        self.later = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = bend(self.conv(x)) ** self.power
        x = self.act(x - self.shift) + self.slope * x + self.tilt + self.own(x) + self.sizes["add"][0]
        x = x * self._gain + float(os.environ.get("OFFSET", "0"))
        return self.fc(self.later(x).mean((2, 3)))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with six images, a cache, and a network of the user's own."""
    values = np.random.default_rng(0)
    for number in range(COUNT):
        Image.fromarray(values.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(tmp_path / f"{number}.bmp")
    (tmp_path / "own_net.py").write_text(NET)
    monkeypatch.setattr("finetune.store.kept_folder", lambda: tmp_path / "kept")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # files of equal size and time would be read from there
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("own_net", None)


def fill(module, seed=0):
    """Give parameters and buffers values that depend on their names, and not on what was drawn before."""
    for name, tensor in module.backbone.state_dict().items():
        if tensor.is_floating_point():
            drawn = torch.rand(
                tensor.shape, generator=torch.Generator().manual_seed(random.Random(f"{name}{seed}").randrange(2**31))
            )
            tensor.copy_(drawn + 0.5 if "running_var" in name else (drawn - 0.5) * 0.5)
            if name.endswith("weight") and tensor.ndim == 1:
                tensor.add_(1)
    return module


class Case:
    """All that activations are computed from; a test changes one thing."""

    def __init__(self, place, *, own=False, options=None, fill_seed=0):
        self.place = place
        importlib.invalidate_caches()
        sys.modules.pop("own_net", None)
        torch.manual_seed(0)
        options = {"num_classes": 3, "weights": "none", **(options or {})}
        backbone = "own_net.Net" if own else "test_resnet"
        self.module = fill(FinetuneModule(backbone, **options).eval(), fill_seed)
        self.stage = "conv" if own else "layer2"
        self.spec = InputSpec(16, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), "bilinear", 0.9)
        self.augment, self.seed, self.view, self.decoded, self.transform = "none", None, 0, None, None
        self.dtype, self.batch, self.workers, self.labels = "float32", 4, 0, [0] * COUNT
        self.plugin = Precision()
        self.module.print = print

    def dataset(self):
        transform = self.transform or (
            eval_transform(self.spec) if self.augment == "none" else train_transform(self.spec, self.augment)
        )
        pictures = [Picture(f"{n}.bmp", label) for n, label in enumerate(self.labels)]
        dataset = PictureDataset(self.place, pictures, transform, self.seed)
        dataset.decoded = self.decoded and keep_decoded(dataset.paths(), self.decoded, 0)
        return dataset

    def trainer(self):
        self.module.expect(self.spec)
        data = SimpleNamespace(input_spec=self.spec)
        parts = {"lightning_module": self.module, "datamodule": data, "global_rank": 0, "world_size": 1}
        return SimpleNamespace(precision_plugin=self.plugin, precision=self.plugin.precision, **parts)

    def served(self):
        loader = DataLoader(self.dataset(), self.batch, num_workers=self.workers)
        trainer = self.trainer()
        self.module._hashed = None  # as in a new process
        reuse = Reuse(2, self.dtype, 1e9)
        return activations(frozen_rows(trainer, loader, self.stage, self.view, reuse, "train"), range(COUNT))

    def fresh(self):
        dataset = self.dataset()
        self.trainer()
        images = torch.stack([dataset[self.view, n]["image"] for n in range(COUNT)])
        with self.plugin.forward_context(), torch.inference_mode():
            return self.module.lower(images, self.stage).float()


def alike(found, wanted, tolerance=1e-5):
    return found.shape == wanted.shape and float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


def edit(case, old, new):
    """Edit the code of the network, and load it as the next process does."""
    text = (case.place / "own_net.py").read_text()
    assert old in text
    (case.place / "own_net.py").write_text(text.replace(old, new))
    return Case(case.place, own=True)


def setting(name, value):
    def change(case):
        *parents, last = name.split(".")
        target = case
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, last, value)

    return change


def spec(**other):
    return lambda case: setattr(case, "spec", InputSpec(**{**vars(case.spec), **other}))


def option(**other):
    return lambda case: Case(case.place, options=other)


def replace_bytes(case, number=0, by_rename=False):
    """Give an image the content of another one; size and time of modification are as before."""
    path, other = case.place / f"{number}.bmp", case.place / "5.bmp"
    status = path.stat()
    if by_rename:
        shutil.copyfile(other, case.place / "new")
        os.utime(case.place / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
        os.replace(case.place / "new", path)
    else:
        path.write_bytes(other.read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


def new_image(case):
    Image.new("RGB", (30, 20), (200, 10, 10)).save(case.place / "2.bmp")


def exchange_names(case):
    for old, new in (("1", "x"), ("4", "1"), ("x", "4")):
        (case.place / f"{old}.bmp").rename(case.place / f"{new}.bmp")


def dilate(case):
    conv = case.module.backbone.layer1[0].conv1
    conv.dilation = conv.padding = (2, 2)


def parametrize(case):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(case.module.backbone.layer1[0].conv1, "weight", Doubled())


def hook(case):
    case.module.backbone.layer1.register_forward_hook(lambda module, inputs, output: output * 2)


def other_forward(case):
    block = case.module.backbone.layer1
    block.forward = lambda x: nn.Sequential.forward(block, x) + 1


def own_normalise(case):
    class Brighter(FinetuneModule):
        def normalise(self, images):
            return super().normalise(images) + 0.5

    case.module.__class__ = Brighter


def train_batchnorm(case):
    case.module.backbone.bn1.train()


def move_statistics(case):
    case.module.backbone.bn1.running_mean.add_(1)


def scale_weights(case):
    with torch.no_grad():
        case.module.backbone.layer1[0].conv1.weight.mul_(1.5)


def move_tilt(case):
    case.module.backbone.tilt.add_(0.5)


def patch_relu(case):
    case.module.backbone.act1 = nn.LeakyReLU(0.5)


def random_views(case):
    case.augment, case.seed = "light", 1


CHANGES = {  # name: (network of one's own, change before, change)
    "bn_eps": (False, None, option(bn_eps=10.0)),
    "act_layer": (False, None, option(backbone_args={"act_layer": "silu"})),
    "weights": (False, None, lambda case: Case(case.place, fill_seed=1)),
    "one weight": (False, None, scale_weights),
    "statistics": (False, None, move_statistics),
    "mean": (False, None, spec(mean=(0.1, 0.1, 0.1))),
    "std": (False, None, spec(std=(0.5, 0.5, 0.5))),
    "interpolation": (False, None, spec(interpolation="bicubic")),
    "crop": (False, None, spec(crop=0.7)),
    "image size": (False, None, spec(size=24)),
    "dtype of weights": (False, None, lambda case: case.module.bfloat16() and None),
    "precision": (False, None, setting("plugin", MixedPrecision("bf16-mixed", "cpu"))),
    "memory format": (False, None, option(memory_format="contiguous")),
    "stage": (False, None, setting("stage", "layer1")),
    "kind of stored number": (False, None, setting("dtype", "float16")),
    "another image": (False, None, new_image),
    "bytes": (False, None, replace_bytes),
    "a file in its place": (False, None, lambda case: replace_bytes(case, by_rename=True)),
    "names exchanged": (False, None, exchange_names),
    "augmentation": (False, None, random_views),
    "seed of the augmentation": (False, random_views, setting("seed", 2)),
    "view": (False, random_views, setting("view", 1)),
    "decoded": (False, None, setting("decoded", 12)),
    "side of decoded": (False, setting("decoded", 12), setting("decoded", 14)),
    "own transform": (False, setting("transform", lambda x: x[:, :16, :16]), setting("transform", lambda x: x[:, 2:18, 2:18])),
    "dilation": (False, None, dilate),
    "module outside of stages": (False, None, setting("module.backbone.maxpool", nn.AvgPool2d(3, 2, 1))),
    "slope of an activation": (False, patch_relu, setting("module.backbone.act1.negative_slope", 0.01)),
    "mode of a layer": (False, setting("batch", COUNT), train_batchnorm),  # statistics of all six images
    "parametrization": (False, None, parametrize),
    "hook": (False, None, hook),
    "forward of one module": (False, None, other_forward),
    "own normalise": (False, None, own_normalise),
    "code of forward": (True, None, lambda case: edit(case, "x - self.shift", "x + self.shift")),
    "code of a helper": (True, None, lambda case: edit(case, "F.relu(x) * SCALE", "F.gelu(x) * SCALE")),
    "global constant": (True, None, lambda case: edit(case, "SCALE = 1.5", "SCALE = 2.5")),
    "class attribute": (True, None, lambda case: edit(case, "power = 1", "power = 2")),
    "default of a lambda": (True, None, lambda case: edit(case, "by=0.5", "by=0.7")),
    "plain attribute": (True, None, setting("module.backbone.slope", 0.9)),
    "nested attribute": (True, None, setting("module.backbone.sizes", {"add": [2.0, 1.0]})),
    "function as attribute": (True, None, setting("module.backbone.act", F.silu)),
    "tensor as attribute": (True, None, setting("module.backbone.shift", torch.tensor(0.75))),
    "buffer that is not saved": (True, None, move_tilt),
}
OF_KEY_ONLY = {"memory format", "names exchanged"}  # no other numbers, or for rows between those that are compared
SMALL = {"precision", "dtype of weights", "interpolation", "kind of stored number"}  # other numbers, by less than rounding may


def start(place, change):
    own, before, act = CHANGES[change]
    case = Case(place, own=own)
    if before:
        before(case)
    return case, case.served(), act


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_served_stale(place, capsys, change):
    case, old, act = start(place, change)
    assert alike(old, case.fresh())
    capsys.readouterr()
    assert torch.equal(case.served(), old)
    assert "reuse" not in capsys.readouterr().out
    case = act(case) or case
    served, said = case.served(), capsys.readouterr().out
    assert "computed once" in said
    assert "not what is computed now" not in said  # the key has seen it
    assert alike(served, case.fresh(), 2e-3 if case.dtype == "float16" else 1e-5)
    assert change in OF_KEY_ONLY | SMALL or not alike(served, old, 1e-3)  # so it would have been wrong


@pytest.mark.parametrize("change", [name for name in CHANGES if name not in OF_KEY_ONLY | SMALL])
def test_what_the_key_does_not_see_a_few_fresh_rows_show(place, capsys, monkeypatch, change):
    monkeypatch.setattr("finetune.reuse.computation_key", lambda *_: "blind")
    monkeypatch.setattr("finetune.reuse.arithmetic", lambda _: ["32-true", "cpu"])
    monkeypatch.setattr("finetune.reuse.dataset_key", lambda *_: {})
    monkeypatch.setattr(FinetuneModule, "frozen_hash", lambda *_: "blind")
    case, old, act = start(place, change)
    capsys.readouterr()
    case = act(case) or case
    served, said = case.served(), capsys.readouterr().out
    assert ("not what is computed now" in said) or served.shape != old.shape or change == "stage"
    assert alike(served, case.fresh(), 2e-3 if case.dtype == "float16" else 1e-5)
    assert torch.equal(case.served(), served)


@pytest.mark.parametrize("hidden", ["private attribute", "environment"])
def test_what_no_key_can_see(place, capsys, monkeypatch, hidden):
    case = Case(place, own=True)
    old = case.served()
    capsys.readouterr()
    if hidden == "environment":
        monkeypatch.setenv("OFFSET", "3")
    else:
        case.module.backbone._gain = 2.0
    served = case.served()
    assert "not what is computed now; they are computed again" in capsys.readouterr().out
    assert alike(served, case.fresh())
    assert not alike(served, old)


def other_head(case):
    with torch.no_grad():
        case.module.head.weight.add_(1)
        case.module.backbone.layer4[0].conv1.weight.add_(1)
    case.module.backbone.layer4[0].bn1.eps = 10.0
    case.module.backbone.layer4.register_forward_hook(lambda *_: None)


def in_training(case):
    case.module.train()
    for stage in case.module.stages[:3]:
        for name in stage.modules:
            case.module.backbone.get_submodule(name).eval()


def move_cache(case):
    shutil.move(case.place / "kept", case.place / "elsewhere")
    case.place.joinpath("kept").symlink_to("elsewhere")


def loaded_anew(case):
    os.utime(case.place / "own_net.py", (1, 1))
    return edit(case, "\n\nclass Net", "\n\n# a comment\n\n\nclass Net")


HITS = {
    "learning rate": (False, option(lr=5.0, optimizer="adamw", schedule="flat")),
    "seed": (False, lambda case: torch.manual_seed(7) and None),
    "workers": (False, setting("workers", 1)),
    "batch size": (False, setting("batch", 2)),
    "head": (False, option(head_init="zero", label_smoothing=0.1, dropout=0.5)),
    "class names": (False, option(class_names=["x", "y", "z"])),
    "number of classes": (False, option(num_classes=5)),
    "labels": (False, setting("labels", [1] * COUNT)),
    "what is above the line": (False, other_head),
    "the mode of the rest": (False, in_training),
    "an option of stages above": (False, option(backbone_args={"output_stride": 8})),
    "the place of the cache": (False, move_cache),
    "a comment": (True, loaded_anew),
    "a copy of the network": (True, lambda case: setattr(case, "module", copy.deepcopy(case.module))),
}


@pytest.mark.parametrize("same", HITS)
def test_what_does_not_matter_finds_the_store(place, capsys, same):
    own, act = HITS[same]
    case = Case(place, own=own)
    old = case.served()
    capsys.readouterr()
    case = act(case) or case
    assert torch.equal(case.served(), old)
    assert "reuse" not in capsys.readouterr().out


def test_the_order_in_which_a_folder_lists_its_files_does_not_matter(tmp_path, monkeypatch):
    for split in ("train", "val"):
        for number in range(COUNT):
            path = tmp_path / split / str(number % 2) / f"{number}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(path)
    files = [picture.file for picture in scan(tmp_path).splits["train"]]
    scandir, listdir = os.scandir, os.listdir

    class Backwards:
        def __init__(self, path="."):
            with scandir(path) as entries:
                self.entries = iter(list(entries)[::-1])

        def __enter__(self):
            return self.entries

        def __exit__(self, *_):
            pass

        def __iter__(self):
            return self.entries

        close = __exit__

    monkeypatch.setattr(os, "scandir", Backwards)
    monkeypatch.setattr(os, "listdir", lambda path=".": listdir(path)[::-1])
    assert [picture.file for picture in scan(tmp_path).splits["train"]] == files
