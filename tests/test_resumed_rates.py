"""The learning rate of every stage at every step of runs whose epochs have different numbers of steps, against tables by hand.

32 images of 8 x 8 pixels, 6 epochs. At batch 4 an epoch has 8 steps, at batch 8 it has 4, at batch 16 it has 2.

cosine, without warm-up: 6 epochs are 180 degrees, so the factor behind e epochs and the share s of the next is
(1 + cos(30 degrees x (e + s))) / 2. Cosines from a table of them, by degrees:

    60: 0.5        75: 0.2588190   90: 0          105: -0.2588190   120: -0.5          127.5: -0.6087614  135: -0.7071068
    142.5: -0.7933533   150: -0.8660254   157.5: -0.9238795   165: -0.9659258   172.5: -0.9914449

gradual:2 with the stages a, b, head and a flat rate: the head trains from the start, b from the third epoch, a from the fifth;
either comes in over half an epoch, n steps with the factors 1/n, 2/n, ..., 1.
"""

import shutil
import warnings
from collections import Counter

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from finetune import FinetuneModule, FolderDataModule

STAGES = ["a", "b", "head"]
LR = 0.5


class Net(nn.Module):
    """Two stages and a classifier."""

    def __init__(self, num_classes=2):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.b = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(4, num_classes)

    def forward(self, images):
        return self.fc(self.b(self.a(images)))


def add(folder, numbers):
    """Write images of these numbers, half of each class."""
    for number in numbers:
        path = folder / "train" / f"c{number % 2}" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    add(folder, range(32))
    return folder


class Watch(L.Callback):
    """Note rates and images of each step and how far the stages move; save and stop behind an epoch, or a batch of it."""

    def __init__(self, path, stop=None):
        self.path, self.stop = path, stop
        self.rates, self.moved, self.seen, self.steps = [], [], Counter(), Counter()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen.update((trainer.current_epoch, int(index)) for index in batch["index"])

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.steps[trainer.current_epoch] += 1
        self.rates.append({group["stage"]: group["lr"] / LR for group in optimizer.param_groups})
        self.before = {
            stage: [dict(module.named_parameters())[n].detach().clone() for n in names] for stage, names in self.of(module)
        }

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if len(self.moved) < len(self.rates):
            now = dict(module.named_parameters())
            pairs = {stage: zip(self.before[stage], names, strict=True) for stage, names in self.of(module)}
            self.moved.append({stage: any(not torch.equal(old, now[n]) for old, n in pair) for stage, pair in pairs.items()})
        if self.stop == (trainer.current_epoch, batch_idx + 1):
            self.save(trainer)

    def on_train_epoch_end(self, trainer, module):
        if self.stop == (trainer.current_epoch + 1, 0):
            self.save(trainer)

    def save(self, trainer):
        trainer.save_checkpoint(self.path)
        trainer.should_stop = True

    @staticmethod
    def of(module):
        return module.stage_parameters().items()


def fit(folder, path, *, batch=4, accumulate=1, schedule=None, stop=None, resume=False, policy="cosine", epochs=6, **options):
    """Train, from the checkpoint at `path` if `resume`, until `stop`, where it is written; return what was watched."""
    torch.manual_seed(0)
    given = {"freezing": "full", "schedule": "cosine"} if policy == "cosine" else {"freezing": "gradual:2", "schedule": "flat"}
    module = FinetuneModule(f"{__name__}.Net", num_classes=2, weights="none", lr=LR, **given, **options)
    data = FolderDataModule(folder, batch_size=batch, image_size=8, workers=0, augment="none", val_fraction=0.0)
    watch = Watch(path, stop)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulate,
        callbacks=[watch, *([GradientAccumulationScheduler(schedule)] if schedule else [])],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*(does not have many workers|not resumable|validation|called before the ``update``).*"
        )
        trainer.fit(module, datamodule=data, ckpt_path=path if resume else None, weights_only=True)
    return watch


def check(watch, expected):
    """Compare the factors of all steps with a table (stage: factors), and make sure that what has a rate moves."""
    found = {stage: [row[stage] for row in watch.rates] for stage in STAGES}
    assert found == {stage: pytest.approx(factors, abs=1e-6) for stage, factors in expected.items()}
    assert watch.moved == [{stage: expected[stage][step] > 0 for stage in STAGES} for step in range(len(watch.rates))]


def all_alike(*factors):
    return {stage: list(factors) for stage in STAGES}


# behind epochs 3 and 4 in steps of half an epoch, and behind epochs 5 and 6 in steps of a quarter
HALVES_34 = (0.75, 0.6294095, 0.5, 0.3705905)
QUARTERS_56 = (0.25, 0.1956193, 0.1464466, 0.1033233, 0.0669873, 0.0380602, 0.0170371, 0.0042776)


@pytest.mark.parametrize("policy", ["cosine", "gradual"])
def test_batch_4_then_16_then_8(tmp_path, images, policy):
    path = tmp_path / "a.ckpt"
    first = fit(images, path, stop=(2, 0), policy=policy)
    second = fit(images, path, batch=16, stop=(4, 0), resume=True, policy=policy)
    third = fit(images, path, batch=8, resume=True, policy=policy)
    assert [len(watch.rates) for watch in (first, second, third)] == [16, 4, 8]
    if policy == "cosine":
        assert first.rates[0]["head"] == 1
        assert first.rates[8]["head"] == pytest.approx((1 + 0.8660254) / 2)  # behind one epoch: 30 degrees
        check(second, all_alike(*HALVES_34))
        check(third, all_alike(*QUARTERS_56))
    else:
        check(first, {"a": [0] * 16, "b": [0] * 16, "head": [1] * 16})
        check(second, {"a": [0] * 4, "b": [1] * 4, "head": [1] * 4})  # half an epoch is one step
        check(third, {"a": [0.5, 1, 1, 1, 1, 1, 1, 1], "b": [1] * 8, "head": [1] * 8})  # and here it is two


@pytest.mark.parametrize("policy", ["cosine", "gradual"])
def test_accumulation_1_then_4(tmp_path, images, policy):
    path = tmp_path / "a.ckpt"
    fit(images, path, stop=(2, 0), policy=policy)
    second = fit(images, path, accumulate=4, stop=(4, 0), resume=True, policy=policy)
    third = fit(images, path, accumulate=2, resume=True, policy=policy)
    if policy == "cosine":
        check(second, all_alike(*HALVES_34))
        check(third, all_alike(*QUARTERS_56))
    else:
        check(second, {"a": [0] * 4, "b": [1] * 4, "head": [1] * 4})
        check(third, {"a": [0.5, 1, 1, 1, 1, 1, 1, 1], "b": [1] * 8, "head": [1] * 8})


@pytest.mark.parametrize("policy", ["cosine", "gradual"])
def test_a_schedule_of_accumulation(tmp_path, images, policy):
    # 2 steps in each of the first four epochs, 4 in the last two; stopped within the fourth and resumed in the same way
    options = {"schedule": {0: 4, 4: 2}, "policy": policy}
    whole = fit(images, tmp_path / "none.ckpt", **options)
    first = fit(images, tmp_path / "a.ckpt", stop=(3, 4), **options)
    second = fit(images, tmp_path / "a.ckpt", resume=True, **options)
    assert whole.steps == {0: 2, 1: 2, 2: 2, 3: 2, 4: 4, 5: 4}
    # 0 and 15, 30 and 45 degrees: cosines 1, 0.9659258, 0.8660254, 0.7071068
    table = all_alike(1, 0.9829629, 0.9330127, 0.8535534, *HALVES_34, *QUARTERS_56)
    if policy == "gradual":
        table = {"a": [0] * 8 + [0.5] + [1] * 7, "b": [0] * 4 + [1] * 12, "head": [1] * 16}
    check(whole, table)
    assert len(first.rates) == 7
    check(second, {stage: factors[7:] for stage, factors in table.items()})


@pytest.mark.parametrize("policy", ["cosine", "gradual"])
def test_images_removed_and_added(tmp_path, images, policy):
    # 32 images at batch 4, then 8: 2 steps; then 16: 4 steps
    folder = shutil.copytree(images, tmp_path / "images")
    path = tmp_path / "a.ckpt"
    fit(folder, path, stop=(2, 0), policy=policy)
    for number in range(8, 32):
        (folder / "train" / f"c{number % 2}" / f"{number:03}.png").unlink()
    second = fit(folder, path, stop=(4, 0), resume=True, policy=policy)
    add(folder, range(40, 48))
    third = fit(folder, path, resume=True, policy=policy)
    if policy == "cosine":
        check(second, all_alike(*HALVES_34))
        check(third, all_alike(*QUARTERS_56))
    else:
        check(second, {"a": [0] * 4, "b": [1] * 4, "head": [1] * 4})
        check(third, {"a": [0.5, 1, 1, 1, 1, 1, 1, 1], "b": [1] * 8, "head": [1] * 8})


@pytest.mark.parametrize("policy", ["cosine", "gradual"])
def test_another_batch_size_within_an_epoch(tmp_path, images, policy):
    # stopped behind 4 of 8 batches of 4 in the third epoch: 16 images are left, which are 4 batches of 4 or 2 of 8
    path = tmp_path / "a.ckpt"
    first = fit(images, path, stop=(2, 4), policy=policy)
    second = fit(images, path, batch=8, stop=(4, 0), resume=True, policy=policy)
    shown = Counter({key: number for watch in (first, second) for key, number in watch.seen.items() if key[0] == 2})
    assert shown == Counter({(2, index): 1 for index in range(32)}), "each image once"
    # half of the third epoch, then quarters of the fourth: 75 and 82.5, 90, 97.5, 105, 112.5 degrees
    if policy == "cosine":
        check(second, all_alike(0.6294095, 0.5652631, 0.5, 0.4347369, 0.3705905, 0.3086583))
    else:  # b came in over 4 steps of the first run, and half an epoch is over
        check(second, {"a": [0] * 6, "b": [1] * 6, "head": [1] * 6})


@pytest.mark.parametrize(
    ("batch", "left", "steps", "shares"), [(16, 20, 1, [3 / 8]), (8, 20, 2, [3 / 8, 5 / 8]), (12, 20, 1, [3 / 8])]
)
def test_what_is_left_of_an_epoch_need_not_be_whole_batches(tmp_path, images, batch, left, steps, shares):
    # stopped behind 3 of 8 batches of 4: 12 of 32 images are shown, 20 are left
    path = tmp_path / "a.ckpt"
    first = fit(images, path, stop=(2, 3))
    second = fit(images, path, batch=batch, resume=True, epochs=4, stop=(2, steps + 99))
    seen = [watch.seen[2, index] for index in range(32) for watch in (first, second)]
    assert max(first.seen[2, index] + second.seen[2, index] for index in range(32)) == 1, "no image twice"
    assert sum(seen) == 12 + steps * batch
    assert left - steps * batch < batch, "what waits is less than a batch"
    assert second.steps == {2: steps, 3: 32 // batch}
    # 4 epochs now: 45 degrees each
    expected = [(1 + np.cos(np.radians(45 * (2 + share)))) / 2 for share in shares]
    assert [row["head"] for row in second.rates[:steps]] == pytest.approx(expected) if batch != 12 else True


def test_two_changes_within_one_epoch(tmp_path, images):
    # 3 batches of 4, one of 8, then what is left, 12 images, by fours: 3 steps at the shares 20/32, 24/32 and 28/32
    path = tmp_path / "a.ckpt"
    watched = [fit(images, path, stop=(2, 3)), fit(images, path, batch=8, stop=(2, 3), resume=True)]
    watched.append(fit(images, path, stop=(3, 0), resume=True))
    assert [watch.steps[2] for watch in watched] == [3, 1, 3]
    assert all(sum(watch.seen[2, index] for watch in watched) == 1 for index in range(32)), "each image once"
    # 78.75, 82.5 and 86.25 degrees: cosines 0.1950903, 0.1305262, 0.0654031
    check(watched[2], all_alike(0.5975452, 0.5652631, 0.5327016))


def test_other_accumulation_within_an_epoch(tmp_path, images):
    # behind 3 of 8 batches; by fours the steps end with batches 4 and 8: at the shares 3/8 and 4/8 of the third epoch
    path = tmp_path / "a.ckpt"
    fit(images, path, stop=(2, 3))
    second = fit(images, path, accumulate=4, resume=True)
    assert second.steps == {2: 2, 3: 2, 4: 2, 5: 2}
    # 71.25, 75, then 90 and 105, 120 and 135, 150 and 165 degrees; cos 71.25 = cos 75 cos 3.75 + sin 75 sin 3.75 = 0.3214394
    check(second, all_alike(0.6607197, 0.6294095, 0.5, 0.3705905, 0.25, 0.1464466, 0.0669873, 0.0170371))


def test_warm_up_in_steps_is_of_the_steps_that_were_made(tmp_path, images):
    # 20 steps of warm-up: 16 at batch 4, 2 epochs, and 4 at batch 16, 2 epochs; then 2 epochs, the half of a cosine
    path = tmp_path / "a.ckpt"
    first = fit(images, path, stop=(2, 0), warmup_steps=20)
    second = fit(images, path, batch=16, resume=True, warmup_steps=20)
    check(first, all_alike(*(step / 20 for step in range(1, 17))))
    # behind epochs 4, 4.5, 5 and 5.5, with 90 degrees an epoch: cosines 1, 0.7071068, 0, -0.7071068
    check(second, all_alike(17 / 20, 18 / 20, 19 / 20, 1, 1, 0.8535534, 0.5, 0.1464466))
    third = fit(images, path, batch=8, resume=True, stop=(2, 1), warmup_steps=20)
    assert third.rates[0]["head"] == 17 / 20


def test_a_run_of_so_many_steps_keeps_its_steps(tmp_path, images):
    # 24 steps: 16 at batch 4, then 8 at batch 16, four epochs; 7.5 degrees a step
    path = tmp_path / "a.ckpt"
    options = {"epochs": -1, "stop": (2, 0)}
    torch.manual_seed(0)
    first = fit_steps(images, path, 24, **options)
    second = fit_steps(images, path, 24, batch=16, resume=True)
    assert len(first.rates) == 16
    check(second, all_alike(*QUARTERS_56))
    assert second.steps == {2: 2, 3: 2, 4: 2, 5: 2}


def fit_steps(folder, path, steps, **options):
    """Like `fit`, but the run ends after a number of steps."""
    init = L.Trainer.__init__

    def limited(self, **given):
        init(self, **{**given, "max_epochs": -1, "max_steps": steps})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(L.Trainer, "__init__", limited)
        return fit(folder, path, **{**options, "epochs": -1})


def test_a_rate_that_follows_the_batch_follows_it_after_a_resume(tmp_path, images):
    # linear, meant for 4 images: four times the rate at batch 16
    path = tmp_path / "a.ckpt"
    options = {"lr_rule": "linear", "lr_batch": 4}
    fit(images, path, stop=(2, 0), **options)
    second = fit(images, path, batch=16, resume=True, stop=(3, 0), **options)
    assert [row["head"] for row in second.rates] == pytest.approx([4 * 0.75, 4 * 0.6294095])


def test_the_change_is_said_and_nothing_where_there_is_none(tmp_path, images, capsys):
    path = tmp_path / "a.ckpt"
    fit(images, path, stop=(2, 0))
    fit(images, path, resume=True, stop=(3, 0))
    assert "steps where there were" not in capsys.readouterr().out
    fit(images, path, batch=16, resume=True)
    assert (
        "note: epochs 4 to 6 have 2 steps where there were 8: learning rates and phases follow the epochs."
        in capsys.readouterr().out
    )


def test_checkpoints_of_older_versions_go_on_at_the_right_rate(tmp_path, images, capsys):
    path = tmp_path / "a.ckpt"
    fit(images, path, stop=(2, 0))
    old = torch.load(path, weights_only=True)
    del old["finetune"]["pace"]
    torch.save(old, path)
    second = fit(images, path, batch=16, stop=(4, 0), resume=True)
    check(second, all_alike(*HALVES_34))
    assert "2 steps where there were 8" in capsys.readouterr().out


def test_a_model_that_was_loaded_begins_anew_and_is_saved_by_any_trainer(tmp_path, images, capsys):
    path = tmp_path / "a.ckpt"
    fit(images, path, stop=(2, 0))
    module = FinetuneModule.load_from_checkpoint(path)
    data = FolderDataModule(images, batch_size=16, image_size=8, workers=0, augment="none", val_fraction=0.0)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    watch = Watch(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(does not have many workers|validation).*")
        L.Trainer(max_epochs=1, accelerator="cpu", callbacks=[watch], **quiet).fit(module, datamodule=data)
        other = L.Trainer(accelerator="cpu", **quiet)
        other.validate(module, DataLoader(TensorDataset(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])), 2), verbose=False)
    assert "steps where there were" not in capsys.readouterr().out
    check(watch, all_alike(1, 0.5))  # an epoch of two steps: 0 and 90 degrees
    other.save_checkpoint(tmp_path / "b.ckpt")
    assert "pace" not in torch.load(tmp_path / "b.ckpt", weights_only=True)["finetune"]
