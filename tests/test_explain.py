"""Grad-CAM against the case where it is known (CAM), neighbours against a brute-force search, and the pages that are drawn."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune import ConfigError, DataError, FinetuneModule
from finetune.explain import _draw, _Row, draw_mistakes, explain, nearest, see
from finetune.grad_cam import grad_cam
from finetune.labelled import pictures_in
from finetune.main import main
from finetune.outcomes import Outcome, write_outcome
from finetune.predictor import Predictor

RUN = "runs/mine/1"
CLASSES = ("bee", "ant, red", "wasp", "fly")
PICTURES = ["new/a.bmp", "new/b/10.png", "new/b/2.png"]


def images_of(predictor):
    from finetune.images import read_image

    return torch.stack([predictor.transform(read_image(path)) for path in PICTURES])


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("frozen", [False, True])
def test_after_the_last_stage_it_is_the_class_activation_map(frozen):
    """With mean pooling and a linear head, the gradient of a logit is the head's weight: CAM (Zhou et al. 2016)."""
    predictor = Predictor(RUN)
    module = predictor.trained.module.requires_grad_(not frozen)
    images = images_of(predictor)
    labels = torch.tensor([2, 0, 1])
    found = grad_cam(module, images, labels=labels)
    with torch.no_grad():
        activation = module.backbone.forward_features(module.normalise(images))
        cam = torch.einsum("nchw,nc->nhw", activation, module.head.weight[labels]).relu()
        cam = cam / cam.amax((1, 2), keepdim=True).clamp_min(1e-12)
    expected = torch.nn.functional.interpolate(cam[:, None], (32, 32), mode="bilinear")[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert all(parameter.grad is None for parameter in module.parameters())
    last = grad_cam(module, images, module.stages[-1].name)
    predicted = grad_cam(module, images, labels=module(images).argmax(1))
    torch.testing.assert_close(last, predicted)


@pytest.mark.usefixtures("world")
def test_at_an_inner_stage_it_is_the_sum_of_channels_times_mean_gradients():
    predictor = Predictor(RUN)
    module, images = predictor.trained.module, images_of(predictor)
    names = [stage.name for stage in module.stages]
    stage = names[-2]
    activation = module.lower(images, stage).detach().requires_grad_()
    logits = module.head(module.boundaries.upper(activation, stage).flatten(1))
    logits.max(1).values.sum().backward()
    cam = (activation.grad.mean((2, 3), keepdim=True) * activation).sum(1).detach().relu()
    cam = cam / cam.amax((1, 2), keepdim=True)
    expected = torch.nn.functional.interpolate(cam[:, None], (32, 32), mode="bilinear")[:, 0]
    torch.testing.assert_close(grad_cam(module, images, stage), expected, atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="layer9"):
        grad_cam(module, images, "layer9")


def test_a_stage_without_height_and_width_is_refused():
    model = FinetuneModule("test_vit", num_classes=2, weights="none").eval()
    images = torch.zeros(1, 3, model.input_spec.size, model.input_spec.size)
    with pytest.raises(ConfigError, match="has no height and width"):
        grad_cam(model, images, model.stages[-1].name)


@pytest.fixture
def labelled(world):
    sources = sorted(path for path in Path("new").rglob("*") if path.is_file())
    for label, name in enumerate(CLASSES):
        for index in range(3):
            target = Path("labelled", name, f"{label}{index}.png")
            target.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(sources[(label + index) % 5]) as image:
                image.convert("RGB").rotate(90 * label).save(target)
    return world


@pytest.mark.usefixtures("labelled")
def test_neighbours_are_those_of_a_search_by_hand():
    predictor = Predictor(RUN)
    among = pictures_in("labelled", CLASSES)
    found = nearest(predictor, PICTURES, among, 5)
    theirs, mine = (predictor.features(files).astype(np.float64) for files in (among.files, PICTURES))
    theirs, mine = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (theirs, mine))
    cosines = mine @ theirs.T
    np.testing.assert_allclose(found.similarities, -np.sort(-cosines, axis=1)[:, :5], atol=1e-5)
    for files, labels in zip(found.files, found.labels, strict=True):
        assert [CLASSES[label] for label in labels] == [Path(file).parent.name for file in files]
    assert nearest(predictor, PICTURES, among, 99).labels.shape == (3, 12)
    Path(found.files[0][0]).write_bytes(b"no picture")
    without = nearest(predictor, PICTURES[:1], among, 4)
    assert without.files[0] == found.files[0][1:]


@pytest.mark.usefixtures("labelled")
def test_pages_have_a_row_per_picture(capsys):
    shutil.copytree("new", "many")
    for number in range(6):
        shutil.copy("new/a.bmp", f"many/${number}.bmp")
    main(["explain", RUN, "many", "--among", "labelled", "--neighbours", "2", "--out", "pages"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("model  runs/mine/1/checkpoints/best.ckpt (4 classes: bee,")
    assert said[1:] == ["11 pictures: pages/explained-01.png, pages/explained-02.png"]
    with Image.open("pages/explained-01.png") as first, Image.open("pages/explained-02.png") as second:
        assert first.width == second.width
        assert first.height / second.height == pytest.approx(8 / 3, rel=0.01)
    with pytest.raises(ConfigError, match="exists already"):
        explain(RUN, ["many"], out="pages", neighbours=0)
    explain(RUN, ["many"], out="pages", neighbours=0, overwrite=True, stage="layer2", label="wasp", most=1)


@pytest.mark.usefixtures("labelled")
def test_the_worst_mistakes_of_a_run():
    with pytest.raises(DataError, match="no table of predictions"):
        explain(RUN, mistakes=True, neighbours=0)
    probabilities = np.eye(4)[[1, 1, 2]] * 0.8 + 0.05
    write_outcome(Outcome(PICTURES, np.array([1, 0, 1]), probabilities, CLASSES), Path(RUN, "predictions.val.csv"))
    (page,) = explain(RUN, mistakes=True, neighbours=0)
    with Image.open(page) as image:
        height = image.height
    (page,) = explain(RUN, PICTURES[:2], neighbours=0, out="other")
    with Image.open(page) as image:
        assert image.height == height  # two rows: one of the three was right
    assert draw_mistakes(Path(RUN)) == Path(RUN, "explained.png")
    with Image.open(Path(RUN, "explained.png")) as image:
        assert image.height == height
    write_outcome(Outcome(PICTURES, np.array([1, 1, 2]), probabilities, CLASSES), Path(RUN, "predictions.val.csv"))
    assert draw_mistakes(Path(RUN)) is None
    with pytest.raises(DataError, match="made no mistake"):
        explain(RUN, mistakes=True, neighbours=0, out="third")


@pytest.mark.usefixtures("labelled")
def test_a_page_says_what_predict_says_and_shows_what_the_network_saw(capsys):
    predictor, said = Predictor(RUN), Predictor(RUN)(PICTURES)
    known = {PICTURES[0]: _Row("bee", said[0].labels[0]), PICTURES[1]: _Row("bee", "fly")}
    figure = _draw(predictor, see(predictor, PICTURES), None, 0, known, "wasp")
    titles = [axis.get_title() for axis in figure.axes[1::2]]
    assert [title.splitlines()[0] for title in titles] == [f"{each.labels[0]} {each.probabilities[0]:.0%}" for each in said]
    assert titles[0].splitlines()[1] == "is bee"
    assert ("(was fly)" in titles[1]) == (said[1].labels[0] != "fly")
    assert all(("map: wasp" in title) == (each.labels[0] != "wasp") for title, each in zip(titles, said, strict=True))
    for axis, image in zip(figure.axes[::2], images_of(predictor), strict=True):
        assert np.array_equal(axis.images[0].get_array(), image.permute(1, 2, 0).numpy())


@pytest.mark.usefixtures("labelled")
def test_a_table_of_another_checkpoint_is_noted(capsys):
    other = [CLASSES.index(each.labels[0]) for each in Predictor(RUN)(PICTURES)]
    wrong = np.eye(4)[[(number + 1) % 4 for number in other]] * 0.8 + 0.05
    write_outcome(Outcome(PICTURES, np.array([(n + 2) % 4 for n in other]), wrong, CLASSES), Path(RUN, "predictions.val.csv"))
    explain(RUN, mistakes=True, neighbours=0)
    assert "note: for 3 of the 3 images the model says something else" in capsys.readouterr().out
    right = np.eye(4)[other] * 0.8 + 0.05
    write_outcome(Outcome(PICTURES, np.array([(n + 2) % 4 for n in other]), right, CLASSES), Path(RUN, "predictions.val.csv"))
    explain(RUN, mistakes=True, neighbours=0, overwrite=True)
    assert "note" not in capsys.readouterr().out


@pytest.mark.usefixtures("labelled")
def test_mistakes_of_the_user():
    for options, says in (
        ({"label": "wesp"}, r"Unknown class 'wesp'. Did you mean 'wasp'\?"),
        ({"neighbours": -1}, "at least 0"),
        ({"stage": "layer9"}, "layer9"),
    ):
        with pytest.raises(ConfigError, match=says):
            explain(RUN, PICTURES, **{"neighbours": 0, **options})
    with pytest.raises(DataError, match=r"does not say which folder its images were in\. Name a labelled folder .* --among"):
        explain(RUN, PICTURES, neighbours=4)
    assert not Path("explained").exists()
