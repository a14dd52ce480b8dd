"""The data of distillation: both networks see the same, and what the teacher says is kept."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from finetune import DistillDataModule
from finetune.run_split import RunSplit
from finetune.split_changes import first_table
from finetune.transforms import InputSpec


@pytest.fixture(autouse=True)
def _working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESNET_FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])


def teacher_file(folder, seed=1):
    torch.manual_seed(seed)
    path = folder / f"teacher{seed}.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=1000).state_dict(), path)
    return path


def pictures(folder, number=12, size=(40, 40)):
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for index in range(number):
        Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{index:02}.png")
    return folder


def data_of(folder, **options):
    given = {"teacher": "test_resnet", "teacher_size": 32, "image_size": 32, "views": 2, "workers": 0, "val_fraction": 0.25}
    return DistillDataModule(str(folder), **{**given, **options})


# -- what both see ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", ["none", "light", "medium", "strong"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_student_and_teacher_see_the_same_part_of_a_picture(tmp_path, augment, split):
    """The pictures' colours are their coordinates, so a crop says where it was cut, and whether it is mirrored."""
    across, down = np.meshgrid(np.arange(256), np.arange(256))
    (tmp_path / "map").mkdir()
    for number in range(8):
        image = np.stack([across, down, np.full_like(across, 128)], -1).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / "map" / f"{number}.png")
    data = data_of(tmp_path / "map", teacher_weights=teacher_file(tmp_path), augment=augment, val_fraction=0.5)
    parts = {}
    for size, crop in ((32, 0.8), (96, 1.0)):
        spec = InputSpec(size, (0.5,) * 3, (0.5,) * 3, "bilinear", crop)
        dataset = data._dataset(split, spec, varied=False)
        images = torch.stack([dataset[(view, index)]["image"] for view in range(2) for index in range(len(dataset))])
        parts[size] = torch.nn.functional.adaptive_avg_pool2d(images.float(), 4)
    assert (parts[32] - parts[96]).abs().max() < 6  # of 256; another crop or a mirror image is off by far more
    varies = split == "train" and augment != "none"
    assert (len({tuple(part.flatten().tolist()) for part in parts[32]}) > 4) == varies


def test_the_student_alone_sees_other_colours_and_in_each_epoch_others(tmp_path):
    data = data_of(pictures(tmp_path / "p"), teacher_weights=teacher_file(tmp_path), augment="medium")
    spec = InputSpec.default()
    plain, varied = (data._dataset("train", spec, varied=flag) for flag in (False, True))
    teacher = [plain[(view, 0)]["image"] for view in range(2)]
    student = [varied[(epoch, 0)]["image"] for epoch in range(4)]
    for epoch, image in enumerate(student):
        assert not torch.equal(image, teacher[epoch % 2])
        # what ColorJitter keeps is the order of brightness, so the cut is the one of the same view and not of the other
        flat = [x.float().mean(0).flatten() for x in (image, teacher[epoch % 2], teacher[(epoch + 1) % 2])]
        same, other = (torch.corrcoef(torch.stack([flat[0], f]))[0, 1] for f in flat[1:])
        assert same > 0.95 > other
    assert not torch.equal(student[0], student[2])


# -- the teacher works once ---------------------------------------------------------------------------------------------------


def asked(data):
    """Return how many pictures a teacher is asked about while the data are prepared."""
    seen = []
    data.teacher.backbone.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    data.prepare_data()
    return sum(seen)


def test_the_teacher_is_asked_once_per_picture_and_view(tmp_path):
    folder, first, second = pictures(tmp_path / "p"), teacher_file(tmp_path, 1), teacher_file(tmp_path, 2)
    train, val = 9, 3
    assert asked(data_of(folder, teacher_weights=first)) == 2 * train + val
    assert asked(data_of(folder, teacher_weights=first)) == 0
    assert asked(data_of(folder, teacher_weights=first, views=3)) == train  # the third view
    assert asked(data_of(folder, teacher_weights=second)) == 2 * train + val
    assert asked(data_of(folder, teacher_weights=first, teacher_size=48)) == 2 * train + val


def test_a_changed_picture_is_looked_at_again(tmp_path):
    folder, weights = pictures(tmp_path / "p"), teacher_file(tmp_path)
    data = data_of(folder, teacher_weights=weights)
    data.prepare_data()
    before = np.array(data.targets("val", 0))
    changed = data.files["val"][0].file
    Image.new("RGB", (40, 40), (250, 10, 10)).save(changed)
    again = data_of(folder, teacher_weights=weights)
    assert asked(again) == 3  # those of the split that it is in
    after = np.array(again.targets("val", 0))
    assert not np.array_equal(before[0], after[0])
    assert np.array_equal(before[1:], after[1:])


def test_targets_are_the_features_of_the_teacher(tmp_path):
    data = data_of(pictures(tmp_path / "p"), teacher_weights=teacher_file(tmp_path), grid=2, teacher_size=64)
    data.prepare_data()
    dataset = data._dataset("val", replace(data.teacher.input_spec, size=64), varied=False)
    images = torch.stack([dataset[index]["image"] for index in range(3)])
    with torch.inference_mode():
        whole = data.teacher.backbone.forward_features(data.teacher.normalise(images))
    rows = torch.from_numpy(np.array(data.targets("val", 0), dtype=np.float32))
    assert rows.shape == (3, whole.shape[1], 2, 2)
    halves = [part.mean((2, 3)) for half in whole.chunk(2, 2) for part in half.chunk(2, 3)]
    torch.testing.assert_close(rows.flatten(2), torch.stack(halves, 2), rtol=2e-3, atol=2e-3)


def test_features_that_hardly_ever_stir_are_not_blown_up(tmp_path, monkeypatch):
    rows = np.random.default_rng(0).normal(5, 2, (64, 6, 1, 1)).astype(np.float16)
    rows[:, 3] = 0
    rows[7, 3] = 0.01
    data = data_of(pictures(tmp_path / "p"), teacher_weights=teacher_file(tmp_path))
    monkeypatch.setattr(data, "targets", lambda split, view: rows)
    mean, std = data.scale
    exact = rows.astype(np.float32).std(0, ddof=1)[:, 0, 0]
    np.testing.assert_allclose(mean, rows.astype(np.float32).mean(0)[:, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(std[[0, 1, 2, 4, 5]], exact[[0, 1, 2, 4, 5]], rtol=1e-5)
    assert float(std[3]) == pytest.approx(float(np.sort(exact)[2]) / 10, rel=1e-5)


def test_what_is_held_out_stays_so_when_pictures_are_deleted(tmp_path):
    for number in range(40):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    options = {"teacher": "test_resnet", "teacher_weights": "none", "val_fraction": 0.2, "workers": 0}
    before = DistillDataModule(str(tmp_path), **options)
    table = first_table(before.split_images())
    gone, *kept = (picture.file for picture in before.files["val"])
    Path(gone).unlink()
    after = DistillDataModule(str(tmp_path), **options)
    after.continue_from(RunSplit(tmp_path / "checkpoints/last.ckpt", table, table.digest))
    assert [picture.file for picture in after.files["val"]] == kept
    assert after.files["train"] == before.files["train"]
    assert [(change.kind, change.file) for change in after.changes] == [("removed", gone)]
