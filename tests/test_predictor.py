"""Predictor: the same picture in every form, test-time augmentation by hand, and files without end."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune import ConfigError, DataError
from finetune.images import read_image
from finetune.predictor import Predictor
from finetune.transforms import InputSpec, eval_transform

RUN = "runs/mine/1"
PICTURE = Path("new/b/2.png")


@pytest.fixture
def predictor(world):
    assert world == Path.cwd()
    return Predictor(RUN, batch_size=2)


def test_a_picture_is_the_same_in_every_form(predictor):
    pixels = read_image(PICTURE)
    with Image.open(PICTURE) as image:
        forms = [PICTURE, str(PICTURE), PICTURE.read_bytes(), image, np.asarray(image), pixels, pixels / 255]
        found = predictor.probabilities(forms)
        named = predictor([*forms, PICTURE], topk=2)
    assert found.shape == (len(forms), 4)
    for row in found[1:]:
        np.testing.assert_allclose(row, found[0], atol=1e-6)
    best, second = np.argsort(-found[0])[:2]
    for each in named:
        assert each.labels == (predictor.classes[best], predictor.classes[second])
        assert each.probabilities == pytest.approx((found[0][best], found[0][second]), abs=1e-6)
    assert [each.file for each in named] == [str(PICTURE), str(PICTURE), *[""] * 5, str(PICTURE)]
    batch = torch.stack([pixels, pixels.flip(-1)])
    np.testing.assert_allclose(predictor.probabilities(batch), predictor.probabilities([pixels, pixels.flip(-1)]), atol=1e-6)
    np.testing.assert_allclose(predictor.probabilities(pixels.permute(1, 2, 0).numpy()[None]), found[:1], atol=1e-6)
    assert predictor([]) == []
    assert predictor.features([]).shape == (0, predictor.trained.module.head.in_features)


def test_grey_and_turned_pictures_from_memory(predictor):
    grey = Image.open(PICTURE).convert("L")
    same = Image.merge("RGB", [grey] * 3)
    np.testing.assert_allclose(*predictor.probabilities([np.asarray(grey), same]), atol=1e-6)
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    Image.open(PICTURE).rotate(90, expand=True).save(turned, "png", exif=exif)
    np.testing.assert_allclose(*predictor.probabilities([turned.getvalue(), PICTURE]), atol=1e-6)


@pytest.mark.parametrize(
    ("picture", "says"),
    [
        (torch.zeros(3, 8, 8) + 3, r"Tensor of shape \(3, 8, 8\) and torch.float32"),
        (torch.zeros(1, 8, 8), r"Tensor of shape \(1, 8, 8\)"),
        (np.zeros((8, 8, 3)), r"ndarray of shape \(8, 8, 3\) and float64"),
        (np.zeros((8, 8, 2, 2, 2), np.uint8), r"\(8, 8, 2, 2, 2\)"),
        (7, "found int"),
        (b"no picture", "a picture of 10 bytes is not a picture"),
        ("new/gone.png", "gone.png cannot be opened"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_picture(predictor, picture, says):
    with pytest.raises(DataError, match=says):
        predictor([picture])


def by_hand(model, picture):
    with torch.no_grad():
        return model(picture[None]).softmax(1)[0].numpy()


def test_augmentation_is_the_mean_of_views_by_hand(predictor):
    model, spec = predictor.trained.module, predictor.trained.input_spec
    whole = eval_transform(spec)(read_image(PICTURE))
    flip = (by_hand(model, whole) + by_hand(model, whole.flip(-1))) / 2
    np.testing.assert_allclose(Predictor(RUN, tta="flip").probabilities(PICTURE)[0], flip, atol=1e-6)
    side = round(32 * 8 / 7)  # larger than 32 / 0.9, which this input resizes to
    square = eval_transform(InputSpec(side, spec.mean, spec.std, spec.interpolation, 1.0))(read_image(PICTURE))
    far, middle = side - 32, round((side - 32) / 2)
    corners = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
    views = [whole[:, top : top + 32, left : left + 32] for whole in (square, square.flip(-1)) for top, left in corners]
    crops = np.mean([by_hand(model, view) for view in views], axis=0)
    np.testing.assert_allclose(Predictor(RUN, tta="crops").probabilities(PICTURE)[0], crops, atol=1e-6)
    assert np.abs(flip - crops).max() > 1e-3


def test_the_temperature_divides_logits(predictor):
    model = predictor.trained.module
    whole = eval_transform(predictor.trained.input_spec)(read_image(PICTURE))
    with torch.no_grad():
        expected = (model(whole[None]) / 2.5).softmax(1).numpy()
    np.testing.assert_allclose(Predictor(RUN, temperature=2.5).probabilities(PICTURE), expected, atol=1e-6)
    with pytest.raises(ConfigError, match="temperature above 0"):
        Predictor(RUN, temperature=0)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stream_keeps_the_order_and_starts_where_it_is_told(predictor, workers):
    files = [f"new/{name}" for name in ("a.bmp", "b/10.png", "gone.png", "b/2.png", "b/A.jpg", "c.webp", "a.bmp")]
    batches = list(predictor.stream(files, workers=workers))
    assert [len(batch) for batch in batches] == [2, 2, 2, 1]
    answers = [answer for batch in batches for answer in batch]
    assert [answer.file for answer in answers] == files
    assert [bool(answer.error) for answer in answers] == [file == "new/gone.png" for file in files]
    later = [answer for batch in predictor.stream(files, start=3, workers=workers) for answer in batch]
    assert [answer.file for answer in later] == files[3:]
    np.testing.assert_allclose(later[0].values, answers[3].values, atol=1e-6)


class Endless:
    """Pictures without end, which nobody can hold."""

    def __iter__(self):
        return itertools.repeat("new/a.bmp")


@pytest.mark.parametrize("workers", [0, 2])
def test_files_are_read_as_they_come(predictor, workers):
    batches = predictor.stream(Endless(), workers=workers)
    assert [len(batch) for batch in itertools.islice(batches, 3)] == [2, 2, 2]
