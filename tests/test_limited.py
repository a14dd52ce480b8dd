"""Batches that the trainer limits: images of all classes, always the same ones, and tables that name those alone."""

from collections import Counter
from pathlib import Path

import lightning as L
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY
from torch.utils.data import SequentialSampler

from finetune import FinetuneModule, FolderDataModule
from finetune.loading import EvalSampler, stratified_order
from finetune.main import main
from finetune.outcomes import read_outcome
from finetune.sample import digits_folder

NUMBERS = {"train": 24, "val": 12}  # of each of three classes


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for folder in sorted((digits_folder() / "train").iterdir())[:3]:
        images = iter(sorted(folder.iterdir()))
        for split, number in NUMBERS.items():
            (root / split / folder.name).mkdir(parents=True)
            for _ in range(number):
                image = next(images)
                (root / split / folder.name / image.name).symlink_to(image)
    return root


@settings(deadline=None, derandomize=True, database=None, max_examples=150)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(0, 3))
def test_each_beginning_holds_the_classes_in_their_shares(labels, seed):
    order = stratified_order(labels, seed)
    assert sorted(order) == list(range(len(labels)))
    assert order == stratified_order(labels, seed)
    counts, seen = Counter(labels), Counter()
    for done, index in enumerate(order, start=1):
        seen[labels[index]] += 1
        furthest = max(abs(seen[label] - done * count / len(labels)) for label, count in counts.items())
        assert furthest < (1 if len(set(counts.values())) == 1 else 1.5)  # whole images cannot be nearer than about one


def test_which_image_of_a_class_is_drawn():
    assert len({tuple(stratified_order([0] * 9 + [1] * 9, seed)[:4]) for seed in range(20)}) > 15


def test_processes_share_a_subset():
    order = stratified_order([0] * 10 + [1] * 10, 3)
    parts = [list(EvalSampler(range(20), 2, rank, order)) for rank in (0, 1)]
    assert {*parts[0][:3], *parts[1][:3]} == set(order[:6])
    assert isinstance(EvalSampler(range(20), 1, 0, order), SequentialSampler)  # overfit_batches leaves it as it is


class Recorder(FinetuneModule):
    """Remember which images each validation and each training step saw."""

    def __init__(self):
        super().__init__("test_resnet", num_classes=3, weights="none")
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(("train", self.current_epoch, tuple(batch["index"].tolist()), tuple(batch["label"].tolist())))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.seen.append(("val", self.current_epoch, tuple(batch["index"].tolist()), tuple(batch["label"].tolist())))
        return super().validation_step(batch, batch_idx)

    def images(self, split, epoch):
        return sorted(index for s, e, indices, _ in self.seen if (s, e) == (split, epoch) for index in indices)

    def classes(self, split):
        return Counter(label for s, _, _, labels in self.seen if s == split for label in labels)


def recorded(photos, tmp_path, **limits):
    module = Recorder()
    data = FolderDataModule(photos, batch_size=6, eval_batch_size=6, workers=0, image_size=32)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    quiet["num_sanity_val_steps"] = 0
    L.Trainer(accelerator="cpu", max_epochs=2, default_root_dir=tmp_path, **quiet, **limits).fit(module, data)
    return module


@pytest.mark.parametrize(("limit", "each"), [(2, 4), (0.34, 4), (1, 2), (1.0, 12)])
def test_a_limited_validation_sees_all_classes_and_the_same_images(photos, tmp_path, limit, each):
    module = recorded(photos, tmp_path, limit_val_batches=limit, limit_train_batches=1)
    assert module.images("val", 0) == module.images("val", 1)
    assert module.classes("val") == dict.fromkeys(range(3), 2 * each)
    if isinstance(limit, float) and limit == 1.0:
        assert module.images("val", 0) == list(range(36))
    else:
        assert module.images("val", 0) == recorded(photos, tmp_path, limit_val_batches=limit).images("val", 0)


@pytest.mark.parametrize("limit", [2, 0.17])  # of 12 batches
def test_overfitting_validates_with_the_images_it_trains_on(photos, tmp_path, limit):
    module = recorded(photos, tmp_path, overfit_batches=limit)
    assert module.classes("train") == module.classes("val") == dict.fromkeys(range(3), 8)
    assert len({tuple(module.images(split, epoch)) for split in ("train", "val") for epoch in (0, 1)}) == 1


@pytest.mark.parametrize(
    ("limit", "split", "number", "heading"),
    [
        ("limit_val_batches", "val", 12, "val (12 of 36 pictures)"),
        ("overfit_batches", "train", 12, "training (12 of 72 pictures)"),
    ],
)
def test_tables_and_report_say_what_was_measured(photos, tmp_path, monkeypatch, capsys, limit, split, number, heading):
    monkeypatch.chdir(tmp_path)
    Path("plain.yaml").write_text("run: {}\n")
    words = ["--data.root", str(photos), "--data.batch_size", "6", "--data.eval_batch_size", "6", f"--trainer.{limit}", "2"]
    words += ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    main(["fit", "--config", "plain.yaml", *TINY, *words])
    assert f"note: trainer.{limit} le" in capsys.readouterr().out
    (run,) = Path("runs").glob("*/*")
    table = read_outcome(run / "predictions.val.csv")
    assert len(table) == len(set(table.files)) == number
    assert Counter(Path(file).parent.name for file in table.files) == dict.fromkeys(table.classes, number // 3)
    assert all(Path(file).parent.parent == photos / split for file in table.files)
    assert [table.classes[label] for label in table.labels] == [Path(file).parent.name for file in table.files]
    assert heading in (run / "report.html").read_text()
