"""Training on what was kept is training on the pictures; and nothing is kept that a change made wrong."""

import os
import shutil

import lightning as L
import pytest
import torch

from finetune import ConfigError, FinetuneModule, FolderDataModule
from finetune.averaging import PhaseEMA, WiseFT
from finetune.images import read_image
from finetune.sample import digits_folder
from finetune.store import clear, list_kept

pytestmark = pytest.mark.filterwarnings("ignore:.*Found .* module.s. in eval mode")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 3 digits: 80 pictures to train with, 40 to validate with."""
    root = tmp_path_factory.mktemp("photos")
    for split, number in (("train", 27), ("val", 13)):
        for digit in "012":
            target = root / split / digit
            target.mkdir(parents=True)
            for path in sorted((digits_folder() / split / digit).iterdir())[:number]:
                shutil.copy2(path, target)
    return root


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.store.kept_folder", lambda: tmp_path / "kept")


class Watch(L.Callback):
    """What the network was fed, and what came out; what was kept must be, at every step, what a pass over the images gives.

    Compared from equal weights: the activations, the gradients of the step, and logits of validation. Weights of two runs
    drift apart by rounding, however right both are, and a steep training makes much of that.
    """

    def __init__(self):
        self.losses, self.fed, self.val, self.indices, self.labels = [], [], [], [], []
        self.activations = {}
        self.gradients = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.indices.append(batch["index"].tolist())
        self.labels.append(batch["label"].tolist())
        if "kept" not in batch:
            return
        views = trainer.datamodule.reuse.views
        images = pictures_of(trainer.train_dataloader, batch["index"], trainer.current_epoch % views if views else 0)
        with torch.no_grad():
            close(batch["kept"], pl_module.lower(images, batch["stage"]), half_of(trainer))
        self.activations.setdefault(trainer.current_epoch, {}).update(zip(self.indices[-1], batch["kept"].clone(), strict=True))
        if half_of(trainer):
            return
        buffers = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}
        loss = pl_module.loss(pl_module(images), batch["label"])
        trained = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        self.gradients = dict(zip(trained, torch.autograd.grad(loss, trained.values(), allow_unused=True), strict=True))
        for name, buffer in pl_module.named_buffers():  # statistics that the pass moved
            buffer.copy_(buffers[name])

    def on_after_backward(self, trainer, pl_module):
        for name, gradient in (self.gradients or {}).items():
            found = pl_module.get_parameter(name).grad
            assert (found is None) == (gradient is None), name
            if gradient is not None:
                close(found, gradient)
        self.gradients = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].detach().clone())
        self.fed.append("kept" if "kept" in batch else "image")

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if "kept" in batch:
            close(outputs["logits"], pl_module(pictures_of(trainer.val_dataloaders, batch["index"])), half_of(trainer))

    def on_validation_end(self, trainer, pl_module):
        self.val.append(float(trainer.callback_metrics["val/loss"]))


def half_of(trainer):
    return trainer.datamodule.reuse is not None and trainer.datamodule.reuse.dtype == "float16"


def pictures_of(loader, indices, epoch=0):
    dataset = loader.pictures.dataset
    return torch.stack([dataset[epoch, index]["image"] for index in indices.tolist()])


def close(found, wanted, half=False):
    """Compare results of one pass: float32 as it rounds, relative to the largest value."""
    scale = float(wanted.abs().max())
    assert float((found - wanted).abs().max()) <= (1e-3 if half else 2e-5) * scale


def fit(root, *, epochs=2, data=None, seed=0, callbacks=(), **options):
    options = {"weights": "none", "freezing": "head", "lr": 0.05, **options}
    L.seed_everything(seed, verbose=False)
    model = FinetuneModule("test_resnet", num_classes=3, **options)
    folder = FolderDataModule(root, **{"batch_size": 16, "image_size": 32, "augment": "none", "workers": 0, **(data or {})})
    watch = Watch()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(max_epochs=epochs, callbacks=[watch, *callbacks], num_sanity_val_steps=0, **quiet).fit(model, folder)
    return watch, model


@pytest.mark.parametrize(
    ("freezing", "epochs", "kept"),
    [("head", 2, 10), ("last:1", 2, 10), ("last:3", 1, 5), ("gradual", 6, 25), ("lp_ft:1", 2, 5), ("surgical:layer4", 1, 5)],
)
def test_losses_are_those_of_a_run_on_the_pictures(photos, capsys, freezing, epochs, kept):
    options = {"epochs": epochs, "freezing": freezing, "lr": 0.02}  # at a higher rate 1e-7 grows to 1e-3 in the last five steps
    plain, plain_model = fit(photos, **options)
    first, first_model = fit(photos, **options, data={"reuse": "exact"})
    assert "computed once" in capsys.readouterr().out
    assert first.fed == ["kept"] * kept + ["image"] * (len(plain.losses) - kept)
    assert first.indices == plain.indices
    assert first.labels == plain.labels
    torch.testing.assert_close(torch.stack(first.losses[:2]), torch.stack(plain.losses[:2]), rtol=0, atol=1e-4)
    never_trained = set(plain_model.stage_parameters()) - {
        stage for phase in plain_model.timetable.phases for stage in phase.train
    }
    for name, value in plain_model.backbone.state_dict().items():
        if any(stage.holds(name) for stage in plain_model.stages if stage.name in never_trained):
            assert torch.equal(first_model.backbone.state_dict()[name], value), name

    second, second_model = fit(photos, **options, data={"reuse": "exact"})
    assert "computed once" not in capsys.readouterr().out
    assert torch.equal(torch.stack(second.losses), torch.stack(first.losses))
    assert second.val == first.val
    assert all(torch.equal(value, second_model.state_dict()[name]) for name, value in first_model.state_dict().items())


def test_a_second_run_reads_a_few_pictures_only(photos, monkeypatch):
    read = []
    monkeypatch.setattr("finetune.loading.read_image", lambda path, *options: read.append(path) or read_image(path, *options))
    monkeypatch.setattr(Watch, "on_train_batch_start", lambda *_: None)  # which reads them to compare
    monkeypatch.setattr(Watch, "on_validation_batch_end", lambda *_: None)
    first, _ = fit(photos, data={"reuse": "exact"})
    assert len(read) == len(set(read)) == 81 + 39
    del read[:]
    second, _ = fit(photos, data={"reuse": "exact"}, lr=0.01)  # another rate: a sweep costs no pass through the backbone
    assert len(read) == 4 + 4  # compared with what was kept
    assert torch.equal(second.losses[0], first.losses[0])
    assert not torch.equal(second.losses[1], first.losses[1])


def touch_a_picture(root):
    path = sorted((root / "train" / "1").iterdir())[0]
    other = sorted((root / "train" / "2").iterdir())[0]
    path.write_bytes(other.read_bytes())


def exchange_in_secret(root):
    """Give an image the content of another class, with the size and time that it had."""
    path, other = (sorted((root / "train" / digit).iterdir())[0] for digit in "12")
    status, content = path.stat(), other.read_bytes()
    size = max(status.st_size, len(content))
    path.write_bytes(content.ljust(size, b"\0"))  # a decoder stops at the end of the image
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES = {
    "nothing": ({}, {}, None, 0),
    "a picture": ({}, {}, touch_a_picture, 1),  # of the training split, so validation is as before
    "a picture, with its size and time": ({}, {}, exchange_in_secret, 1),
    "the weights": ({"seed": 1}, {}, None, 2),
    "an epsilon": ({"bn_eps": 10.0}, {}, None, 2),
    "an activation function": ({"backbone_args": {"act_layer": "silu"}}, {}, None, 2),
    "the input size": ({}, {"image_size": 40}, None, 2),
    "the transform": ({}, {"augment": "light", "reuse": "views:1"}, None, 1),
    "the stage": ({"freezing": "last:1"}, {}, None, 2),
    "the kind of number": ({}, {"reuse_dtype": "float16"}, None, 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_change_makes_wrong_is_computed_again(photos, tmp_path, capsys, change):
    root = shutil.copytree(photos, tmp_path / "copy")
    options, data, act, again = CHANGES[change]
    fit(root, epochs=1, data={"reuse": "exact"})
    if act:
        act(root)
    capsys.readouterr()
    watch, _ = fit(root, epochs=1, data={"reuse": "exact", **data}, **options)
    assert capsys.readouterr().out.count("computed once") == again
    plain, _ = fit(root, epochs=1, data={**data, "reuse": "off"}, **options)
    if change not in ("the transform", "the kind of number"):
        torch.testing.assert_close(watch.losses[0], plain.losses[0], rtol=0, atol=1e-4)


def test_views_take_turns(photos):
    class Feed(Watch):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.setdefault(trainer.current_epoch, {}).update(zip(batch["index"].tolist(), batch["kept"].clone(), strict=True))

    seen = {}
    L.seed_everything(0, verbose=False)
    model = FinetuneModule("test_resnet", num_classes=3, weights="none", freezing="head")
    data = FolderDataModule(photos, batch_size=8, image_size=32, augment="medium", workers=0, reuse="views:2")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(max_epochs=4, callbacks=[Feed()], num_sanity_val_steps=0, **quiet).fit(model, data)
    common = set.intersection(*(set(epoch) for epoch in seen.values()))
    assert len(common) > 60
    for index in common:
        a, b, c, d = (seen[epoch][index] for epoch in range(4))
        assert torch.equal(a, c)
        assert torch.equal(b, d)
        assert not torch.equal(a, b)
    assert len(list_kept()) == 3  # two views to train with, and the validation pictures


def test_half_precision_takes_half_the_room(photos):
    plain, _ = fit(photos)
    half, _ = fit(photos, data={"reuse": "exact", "reuse_dtype": "float16"})
    torch.testing.assert_close(torch.stack(half.losses), torch.stack(plain.losses), rtol=0, atol=5e-3)
    bytes_of = {one.about["pictures"].split()[0]: one.folder.joinpath("rows").stat().st_size for one in list_kept()}
    assert bytes_of["train"] == 81 * 96 * 2


def test_above_the_budget_pictures_are_read(photos, capsys):
    plain, _ = fit(photos, freezing="last:1", epochs=1)
    capsys.readouterr()
    watch, _ = fit(photos, freezing="last:1", epochs=1, data={"reuse": "exact", "reuse_budget": 1e-6})
    assert "above data.reuse_budget (1.0 kB)" in capsys.readouterr().out
    assert watch.fed == ["image"] * 5
    assert torch.equal(torch.stack(watch.losses), torch.stack(plain.losses))
    assert list_kept() == []


def test_two_heads_share_what_is_kept(photos, capsys):
    fit(photos, data={"reuse": "exact"})
    capsys.readouterr()
    fit(photos, data={"reuse": "exact"}, label_smoothing=0.1, optimizer="adamw", freezing="lp_ft:1")
    assert "computed once" not in capsys.readouterr().out
    assert all(clear(one) for one in list_kept())


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({}, {"reuse": "exact", "augment": "light"}, r"augment none, or data\.reuse views:8"),
        ({}, {"reuse": "exakt"}, r"Did you mean 'exact'"),
        ({}, {"reuse": "views"}, "Expected off, exact or views:K"),
        ({}, {"reuse": "views:0"}, "Expected off, exact or views:K"),
        ({"freezing": "full"}, {"reuse": "exact"}, "model.freezing full even the first stage changes"),
        ({"freezing": "norm"}, {"reuse": "exact"}, "model.freezing norm even the first stage changes"),
        ({"bn": "train"}, {"reuse": "exact"}, "BatchNorm statistics of all stages move"),
    ],
)
def test_where_it_would_be_wrong_it_refuses(photos, options, data, message):
    with pytest.raises(ConfigError, match=message):
        fit(photos, data=data, **options)


def test_a_module_that_knows_no_stages(photos):
    class Plain(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)

        def training_step(self, batch, index):
            return self.layer(batch["image"].float().mean((2, 3))).sum()

        def validation_step(self, batch, index):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = FolderDataModule(photos, batch_size=16, image_size=32, augment="none", workers=0, reuse="exact")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    with pytest.raises(ConfigError, match="needs a FinetuneModule, found Plain"):
        L.Trainer(max_epochs=1, limit_val_batches=0, **quiet).fit(Plain(), data)


def test_a_later_phase_freezes_what_was_trained_meanwhile(photos):
    phases = [{"train": "head", "epochs": 1}, {"train": "full", "epochs": 1}, {"train": "head", "epochs": 1}]
    plain, _ = fit(photos, epochs=3, freezing=phases, lr=0.01)
    kept, _ = fit(photos, epochs=3, freezing=phases, lr=0.01, data={"reuse": "exact"})
    assert kept.fed == ["kept"] * 5 + ["image"] * 5 + ["kept"] * 5
    assert kept.indices == plain.indices
    torch.testing.assert_close(torch.stack(kept.losses[:2]), torch.stack(plain.losses[:2]), rtol=0, atol=1e-4)
    assert abs(float(plain.losses[0] - plain.losses[-1])) > 1e-2  # training moved what is frozen in the end
    common = set(kept.activations[0]) & set(kept.activations[2])
    assert len(common) > 60
    assert all(float((kept.activations[0][n] - kept.activations[2][n]).abs().max()) > 1e-2 for n in common)


def test_a_head_is_solved_for_on_what_is_kept_also_for_runs_with_other_seeds(photos, capsys):
    options = {"freezing": "head", "head_init": "logistic", "lr": 1e-12}
    torch.manual_seed(0)
    weights = FinetuneModule("test_resnet", num_classes=3, weights="none").backbone.state_dict()
    torch.save(weights, photos.parent / "w.pth")
    heads = []
    for seed, data in ((0, {}), (0, {"reuse": "exact"}), (1, {"reuse": "exact"})):
        _, model = fit(photos, epochs=1, seed=seed, data=data, weights=str(photos.parent / "w.pth"), **options)
        heads.append(model.head.weight.detach())
        made = capsys.readouterr().out.count("computed once")
        assert made == (2 if data and not seed else 0)  # training and validation, each once
    torch.testing.assert_close(heads[1], heads[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(heads[2], heads[1])


@pytest.mark.parametrize("average", [PhaseEMA(0.9), WiseFT(0.5)])
def test_what_an_average_still_changes_is_not_kept(photos, average):
    phases = [{"train": "head", "epochs": 1}, {"train": "full", "epochs": 1}, {"train": "head", "epochs": 1}]
    with pytest.raises(ConfigError, match="stem computes: it is frozen after it was trained"):
        fit(photos, epochs=3, freezing=phases, lr=0.01, data={"reuse": "exact"}, callbacks=[average])
    fit(photos, epochs=2, freezing=phases[:2], lr=0.01, data={"reuse": "exact"}, callbacks=[average])


def test_the_same_module_with_other_weights_is_another(photos, capsys):
    data = {"batch_size": 16, "image_size": 32, "augment": "none", "workers": 0, "reuse": "exact"}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    model = FinetuneModule("test_resnet", num_classes=3, weights="none", freezing="head")
    for times in range(2):
        capsys.readouterr()
        L.Trainer(max_epochs=1, num_sanity_val_steps=0, **quiet).fit(model, FolderDataModule(photos, **data))
        assert capsys.readouterr().out.count("computed once") == 2, times
        with torch.no_grad():
            model.backbone.layer1[0].conv1.weight.add_(0.1)
