"""Why a model names a class: where in the picture it looked (Grad-CAM), and which training pictures it finds most alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from finetune.console import say
from finetune.errors import ConfigError, DataError, did_you_mean
from finetune.grad_cam import look
from finetune.labelled import Labelled, data_of, pictures_in, why_no_images
from finetune.outcomes import Floats, Ints, read_outcome
from finetune.predictor import Answer, Prediction, Predictor
from finetune.run_files import EXPLAINED
from finetune.runs import run_of
from finetune.scores import worst_mistakes
from finetune.stages import require_stage
from finetune.trained import describe_trained, probabilities_of
from finetune.walk import Pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PER_PAGE = 8
_NEIGHBOURS = 4


class Seen(NamedTuple):
    """Images as a model saw them, and what it made of them.

    Attributes:
        images: As the network got them, uint8 (N, 3, size, size).
        maps: Where it looked, (N, size, size), see `look`.
        predictions: What it says of each, as `predict` does.
    """

    images: Tensor
    maps: Tensor
    predictions: list[Prediction]


def see(predictor: Predictor, files: Sequence[str], stage: str | None = None, label: int | None = None) -> Seen:
    """Run a model on images; what it says and where it looked come from the same forward pass.

    Args:
        predictor: The model, without test-time augmentation.
        files: The images.
        stage: The stage to look at, see `look`.
        label: Number of the class to speak for; the predicted one if None.

    Raises:
        ConfigError: If the stage shows no places, or the model is an export.
        DataError: If an image cannot be read.
    """
    module = predictor.trained.require_module()
    images = predictor.inputs(list(files))
    labels = None if label is None else torch.full((len(images),), label)
    found = look(module, images.to(module.device), stage, labels)
    rows = probabilities_of(found.logits, predictor.trained.temperature).numpy(force=True)
    answers = [Answer(file, row, "") for file, row in zip(files, rows, strict=True)]
    return Seen(images, found.maps.cpu(), [predictor.top(answer, 1) for answer in answers])


@dataclass(frozen=True)
class Neighbours:
    """The training pictures that are most alike in feature space.

    Attributes:
        files: Their paths, (N, K).
        labels: Numbers of their classes, (N, K).
        similarities: Cosines of the features, (N, K), the highest first.
    """

    files: list[list[str]]
    labels: Ints
    similarities: Floats


def nearest(predictor: Predictor, pictures: Sequence[str], among: Labelled, number: int = 5) -> Neighbours:
    """Find the pictures that the model sees as most alike.

    Args:
        predictor: The model.
        pictures: N pictures.
        among: Where to look; pictures that cannot be read are passed over.
        number: How many for each.

    Raises:
        DataError: If none of the pictures to look among can be read.
    """
    from sklearn.neighbors import NearestNeighbors

    answers = [answer for batch in predictor.stream(among.files, embed=True) for answer in batch]
    known = [(answer, label) for answer, label in zip(answers, among.labels, strict=True) if answer.values is not None]
    if not known:
        raise DataError(f"None of the {len(answers)} pictures of {among.name} can be read. The first: {answers[0].error}")
    search = NearestNeighbors(n_neighbors=min(number, len(known)), metric="cosine").fit([answer.values for answer, _ in known])
    distances, found = search.kneighbors(predictor.features(list(pictures)))
    files = [[known[index][0].file for index in row] for row in found]
    labels = np.array([label for _, label in known], np.int64)
    return Neighbours(files, labels[found], np.asarray(1 - distances, np.float64))


def explain(
    model: str,
    pictures: Sequence[str] = (),
    mistakes: bool = False,
    out: str = "explained",
    stage: str | None = None,
    label: str | None = None,
    neighbours: int | None = None,
    among: str | None = None,
    most: int = 40,
    device: str = "auto",
    overwrite: bool = False,
) -> list[Path]:
    """Do what `resnet-finetune explain` does: draw pages with a row per picture.

    Args:
        model: A checkpoint, a run's folder (its best checkpoint), or `last`.
        pictures: Folders, files and patterns.
        mistakes: Explain the worst mistakes of the run on its validation or test pictures instead.
        out: The folder to write into.
        stage: The stage to look at; the last one with height and width if None.
        label: The class to speak for; the predicted one if None.
        neighbours: How many training images to show beside each, 0 for none; 4 if None, or none where they cannot be read.
        among: A folder of labelled pictures to look for neighbours in; the run's training pictures if None.
        most: At most so many pictures.
        device: A torch device, or `auto`.
        overwrite: Replace pages that are there.

    Returns:
        The pages.

    Raises:
        ConfigError: If the stage or class is unknown, or a page would be overwritten.
        DataError: If there is no picture.
    """
    if (neighbours or 0) < 0 or most < 1:
        raise ConfigError(f"Expected --neighbours of at least 0 and --most of at least 1, found {neighbours} and {most}.")
    predictor = Predictor(model, device=device)
    say(describe_trained(predictor.trained))
    if stage is not None:
        require_stage(stage, [each.name for each in predictor.trained.require_module().stages])
    true: dict[str, _Row] = {}
    if mistakes:
        true = _mistakes(predictor, most)
        if not true:
            raise DataError(f"{predictor.trained.path} made no mistake on the pictures it was measured on.")
    elif not pictures:
        raise DataError(
            "No images were named: give a folder or files, or --mistakes for the run's worst mistakes on the images that it "
            "was measured on."
        )
    files = list(true) if mistakes else Pictures(pictures).all()[:most]
    target = Path(out)
    pages = [files[at : at + _PER_PAGE] for at in range(0, len(files), _PER_PAGE)]
    places = [target / f"explained-{number:02d}.png" for number in range(1, len(pages) + 1)]
    if not overwrite and (there := [path for path in places if path.exists()]):
        raise ConfigError(f"{there[0]} exists already and is not overwritten: give another --out, or --overwrite.")
    number = None if label is None else _number(label, predictor.classes)
    alike = _neighbours(predictor, files, among, neighbours)
    target.mkdir(parents=True, exist_ok=True)
    differ = 0
    for index, (page, place) in enumerate(zip(pages, places, strict=True)):
        seen = see(predictor, page, stage, number)
        differ += sum(each.file in true and true[each.file].said != each.labels[0] for each in seen.predictions)
        _draw(predictor, seen, alike, index * _PER_PAGE, true, label).savefig(place, dpi=110)
    if differ:
        say(
            f"note: for {differ} of the {len(files)} images the model says something else than the run's table of predictions: "
            "the checkpoint or the images have changed since, or the table was made at another precision."
        )
    say(f"{len(files)} pictures: {', '.join(map(str, places))}")
    return places


def draw_mistakes(run: Path, most: int = 6) -> Path | None:
    """Draw where the best checkpoint of a run looked in its worst mistakes, for the report; None if it made none.

    Args:
        run: The run's folder.
        most: At most so many pictures.

    Raises:
        FinetuneError: If its checkpoint or its pictures cannot be read.
    """
    predictor = Predictor(run, device="cpu")
    true = _mistakes(predictor, most)
    if not true:
        return None
    _draw(predictor, see(predictor, list(true)), None, 0, true).savefig(run / EXPLAINED, dpi=110)
    return run / EXPLAINED


class _Row(NamedTuple):
    """A row of the table of predictions of a run: the true class of an image, and the one that the run's model said."""

    true: str
    said: str


def _mistakes(predictor: Predictor, most: int) -> dict[str, _Row]:
    """Return the worst mistakes of a run by their files."""
    run = run_of(predictor.trained.path)
    tables = [] if run is None else [table for s in ("test", "val") if (table := run / f"predictions.{s}.csv").is_file()]
    if not tables:
        raise DataError(
            f"There is no table of predictions beside {predictor.trained.path}: expected predictions.val.csv in its run's "
            "folder. Name pictures instead of --mistakes."
        )
    outcome = read_outcome(tables[0])
    said = outcome.predicted
    return {
        outcome.files[i]: _Row(outcome.classes[outcome.labels[i]], outcome.classes[said[i]])
        for i in worst_mistakes(outcome, most)
    }


def _neighbours(predictor: Predictor, files: Sequence[str], among: str | None, number: int | None) -> Neighbours | None:
    """Return the neighbours of images; without a number that was asked for, none where there is nothing to look among."""
    if number == 0:
        return None
    try:
        return nearest(predictor, files, _among(predictor, among), _NEIGHBOURS if number is None else number)
    except DataError as error:
        if number is not None or among is not None:
            raise
        say(f"note   Without neighbours. {error}")
        return None


def _among(predictor: Predictor, folder: str | None) -> Labelled:
    if folder is not None:
        return pictures_in(folder, predictor.classes)
    data = data_of(predictor.trained.path)
    if data is None:
        raise DataError(
            f"{why_no_images(predictor.trained.path)}. Name a labelled folder to find neighbours in with --among, or leave "
            "them out: --neighbours 0."
        )
    return Labelled(data.folder.root, "train", [str(path) for path in data.files("train")], data.labels("train"))


def _number(label: str, classes: Sequence[str]) -> int:
    if label not in classes:
        raise ConfigError(f"Unknown class '{label}'.{did_you_mean(label, classes)} Expected {', '.join(classes[:20])}.")
    return list(classes).index(label)


def _draw(
    predictor: Predictor, seen: Seen, alike: Neighbours | None, first: int, true: dict[str, _Row], label: str | None = None
) -> Figure:
    """Draw a page: the images as the network saw them, where it looked, and their neighbours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 2 + (alike.labels.shape[1] if alike else 0)
    figure = Figure(figsize=(2 * columns, 2.35 * len(seen.images)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(seen.images), columns, squeeze=False)
    for row, (image, cam, prediction) in enumerate(zip(*seen, strict=True)):
        _show(axes[row][0], image, Path(prediction.file).name)
        _show(axes[row][1], image, caption(prediction, true.get(prediction.file), label))
        axes[row][1].imshow(cam.numpy(), cmap="inferno", alpha=0.55, vmin=0, vmax=1)
        for rank in range(columns - 2):
            assert alike is not None
            other, number = alike.files[first + row][rank], int(alike.labels[first + row][rank])
            similarity = alike.similarities[first + row][rank]
            _show(axes[row][2 + rank], predictor.inputs(other)[0], f"{predictor.classes[number]}\n{similarity:.2f}")
    return figure


def caption(prediction: Prediction, known: _Row | None = None, label: str | None = None) -> str:
    """Return what stands above a map: the prediction, the true class where it is known, and the class that the map is of.

    >>> caption(Prediction("a.jpg", ("ants",), (0.889,)), _Row("bees", "ants")).splitlines()
    ['ants 89%', 'is bees']
    """
    lines = [f"{prediction.labels[0]} {prediction.probabilities[0]:.0%}"]
    if known is not None:
        then = "" if known.said == prediction.labels[0] else f" (was {known.said})"
        lines.append(f"is {known.true}{then}")
    if label is not None and label != prediction.labels[0]:
        lines.append(f"map: {label}")
    return "\n".join(lines)


def _show(axis: Any, image: Tensor, title: str) -> None:
    axis.imshow(image.permute(1, 2, 0).numpy())
    axis.set_title(title.replace("$", r"\$")[:60], fontsize=8)
    axis.set_axis_off()
