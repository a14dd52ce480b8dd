"""The sheet of training pictures: what the network sees, and a run that does not notice."""

import io

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from finetune.augmented import AUGMENTED, AugmentedPictures, first_pictures
from finetune.data import FolderDataModule
from finetune.module import FinetuneModule
from finetune.thumbnails import jpeg, sheet


@pytest.fixture
def photos(tmp_path):
    numbers = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / "train" / name).mkdir(parents=True)
        for number in range(8):
            picture = numbers.integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(picture).save(tmp_path / "photos" / "train" / name / f"{number}.png")
    return tmp_path / "photos"


class Seen(FinetuneModule):
    """Remembers the pictures that it was trained on."""

    def on_fit_start(self):
        self.seen = []

    def training_step(self, batch, batch_idx):
        if "image" in batch:
            self.seen.append((batch["image"].clone(), batch["label"].tolist()))
        return super().training_step(batch, batch_idx)


def fit(tmp_path, photos, *callbacks, **options):
    L.seed_everything(3)
    data = FolderDataModule(photos, batch_size=8, image_size=32, workers=0, **{"augment": "strong", **options})
    model = Seen("test_resnet", num_classes=2, weights="none", freezing="head" if "reuse" in options else "full", bn="frozen")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(default_root_dir=tmp_path, max_epochs=2, accelerator="cpu", callbacks=list(callbacks), **quiet)
    trainer.fit(model, data)
    return model, data


def test_it_shows_the_very_pictures_of_the_first_step(tmp_path, photos):
    model, _ = fit(tmp_path, photos, AugmentedPictures(tmp_path, most=6))
    images, labels = model.seen[0]
    names = [("cat", "dog")[label] for label in labels]
    expected = sheet([image.permute(1, 2, 0).numpy() for image in images[:6]], names[:6])
    assert (tmp_path / AUGMENTED).read_bytes() == jpeg(expected)


@pytest.mark.filterwarnings("ignore:.*random.*")
def test_where_activations_are_kept_it_shows_what_they_were_made_of(tmp_path, photos):
    model, data = fit(tmp_path, photos, AugmentedPictures(tmp_path, most=6), reuse="views:2")
    assert not model.seen
    found = Image.open(io.BytesIO((tmp_path / AUGMENTED).read_bytes()))
    assert found.size == (4 * (192 + 6) - 6, 2 * (192 + 17 + 12) - 6)
    plain, _ = fit(tmp_path, photos, augment="strong")
    images, labels = plain.seen[0]
    names = [data.classes[label] for label in labels]
    expected = sheet([image.permute(1, 2, 0).numpy() for image in images[:6]], names[:6])
    assert (tmp_path / AUGMENTED).read_bytes() == jpeg(expected)  # view 0 is epoch 0


@pytest.mark.parametrize("options", [{}, {"reuse": "views:2"}], ids=str)
def test_the_run_does_not_notice(tmp_path, photos, options):
    plain, _ = fit(tmp_path, photos, **options)
    watched, _ = fit(tmp_path, photos, AugmentedPictures(tmp_path), **options)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, watched.state_dict()[name]), name


def test_a_resumed_run_keeps_the_first_sheet(tmp_path, photos):
    (tmp_path / AUGMENTED).write_bytes(b"of the start")
    fit(tmp_path, photos, AugmentedPictures(tmp_path))
    assert (tmp_path / AUGMENTED).read_bytes() == b"of the start"


def test_a_failure_is_a_line_and_no_end(tmp_path, photos, capsys):
    fit(tmp_path, photos, AugmentedPictures(tmp_path / "nowhere"))
    assert "warning: augmented.jpg could not be written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("batch", "number", "labels"),
    [
        ((torch.zeros(3, 3, 4, 4), torch.tensor([0, 1, 2])), 2, [0, 1]),
        ([torch.zeros(1, 3, 4, 4), torch.zeros(1, 5)], 1, [None]),  # labels that are mixed
        ({"image": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, 2, [None, None]),
        ({"image": torch.zeros(2, 1, 4, 4), "label": torch.zeros(2)}, 0, []),
        ({"text": ["a"]}, 0, []),
        (torch.zeros(2, 3), 0, []),
        ([torch.zeros(2, 3, 4, 4)], 2, [None, None]),
    ],
)
def test_batches_of_other_data_modules(batch, number, labels):
    images, found = first_pictures(batch, None, 0, most=2)
    assert len(images) == number
    assert found == labels
