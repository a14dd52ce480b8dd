"""Why a model names a class: where in the picture it looked (Grad-CAM), and which training pictures it finds most alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.errors import ConfigError, DataError, did_you_mean
from finetune.images import read_image
from finetune.labelled import Labelled, data_of, pictures_in
from finetune.outcomes import Floats, Ints, read_outcome
from finetune.predictor import Predictor
from finetune.run_files import EXPLAINED
from finetune.runs import run_of
from finetune.scores import worst_mistakes
from finetune.staged import StagedModule
from finetune.stages import require_stage
from finetune.walk import Pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PER_PAGE = 8


def grad_cam(module: StagedModule, images: Tensor, stage: str | None = None, labels: Tensor | None = None) -> Tensor:
    """Show where in pictures the output of a stage speaks for a class (Grad-CAM, Selvaraju et al. 2017).

    The channels of the stage's output are weighted with their mean gradient, summed, and kept where positive.

    Args:
        module: The model, in eval mode.
        images: (N, 3, H, W), uint8, or float in [0, 1].
        stage: Its name; the last stage whose output has height and width if None.
        labels: Number of the class for each picture, (N,); the predicted one if None.

    Returns:
        (N, H, W) between 0 (nothing speaks for the class) and 1 (the strongest place of the picture).

    Raises:
        ConfigError: If there is no such stage, or its output has no height and width.
    """
    names = [each.name for each in module.stages]
    if stage is not None:
        require_stage(stage, names)
    outputs, logits = _outputs(module, images, names if stage is None else [stage])
    spatial = [name for name in outputs if outputs[name].ndim == 4]
    if not spatial:
        raise ConfigError(f"The output of {stage or 'every stage'} has no height and width, so there is no place to point at.")
    activation = outputs[spatial[-1]]
    labels = logits.argmax(1) if labels is None else labels.to(logits.device)
    (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), activation)
    speaks = (gradient.mean((2, 3), keepdim=True) * activation).sum(1, keepdim=True).detach().relu()
    strongest = speaks.amax((1, 2, 3), keepdim=True)
    speaks = torch.where(strongest > 0, speaks / strongest, 0)
    return F.interpolate(speaks, images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


def _outputs(module: StagedModule, images: Tensor, names: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
    """Return the output of some stages, each ready to be differentiated by, and the logits."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: Any, __: Any, output: Any) -> Tensor | None:
            if not isinstance(output, Tensor):
                return None
            outputs[name] = output if output.requires_grad else output.detach().requires_grad_()
            return outputs[name].clone()  # the next layer may write into it

        return hook

    stages = [stage for stage in module.stages if stage.name in names]
    handles = [
        module.backbone.get_submodule(inner).register_forward_hook(keep(stage.name))
        for stage in stages
        for inner in stage.modules
    ]
    try:
        with torch.enable_grad():
            logits = module(images)
    finally:
        for handle in handles:
            handle.remove()
    return outputs, logits


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
    neighbours: int = 4,
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
        neighbours: How many training pictures to show beside each, 0 for none.
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
    if neighbours < 0 or most < 1:
        raise ConfigError(f"Expected --neighbours of at least 0 and --most of at least 1, found {neighbours} and {most}.")
    predictor = Predictor(model, device=device)
    module = predictor.trained.require_module()
    if stage is not None:
        require_stage(stage, [each.name for each in module.stages])
    true: dict[str, str] = {}
    if mistakes:
        true = _mistakes(predictor, most)
        if not true:
            raise DataError(f"{predictor.trained.path} made no mistake on the pictures it was measured on.")
    files = list(true) if mistakes else Pictures(pictures).all()[:most]
    target = Path(out)
    pages = [files[at : at + _PER_PAGE] for at in range(0, len(files), _PER_PAGE)]
    places = [target / f"explained-{number:02d}.png" for number in range(1, len(pages) + 1)]
    if not overwrite and (there := [path for path in places if path.exists()]):
        raise ConfigError(f"{there[0]} exists already and is not overwritten: give another --out, or --overwrite.")
    number = None if label is None else _number(label, predictor.classes)
    alike = nearest(predictor, files, _among(predictor, among), neighbours) if neighbours else None
    target.mkdir(parents=True, exist_ok=True)
    for index, (page, place) in enumerate(zip(pages, places, strict=True)):
        images = torch.stack([predictor.transform(read_image(file, predictor.trained.input_spec.white)) for file in page])
        wanted = None if number is None else torch.full((len(page),), number)
        cams = grad_cam(module, images.to(module.device), stage, wanted).cpu()
        _draw(predictor, page, images, cams, alike, index * _PER_PAGE, true).savefig(place, dpi=110)
    print(f"{len(files)} pictures: {', '.join(map(str, places))}")
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
    module = predictor.trained.require_module()
    true = _mistakes(predictor, most)
    if not true:
        return None
    files = list(true)
    images = torch.stack([predictor.transform(read_image(file, predictor.trained.input_spec.white)) for file in files])
    _draw(predictor, files, images, grad_cam(module, images), None, 0, true).savefig(run / EXPLAINED, dpi=110)
    return run / EXPLAINED


def _mistakes(predictor: Predictor, most: int) -> dict[str, str]:
    """Return the worst mistakes of a run, and their true classes."""
    run = run_of(predictor.trained.path)
    tables = [] if run is None else [table for s in ("test", "val") if (table := run / f"predictions.{s}.csv").is_file()]
    if not tables:
        raise DataError(
            f"There is no table of predictions beside {predictor.trained.path}: expected predictions.val.csv in its run's "
            "folder. Name pictures instead of --mistakes."
        )
    outcome = read_outcome(tables[0])
    return {outcome.files[i]: outcome.classes[outcome.labels[i]] for i in worst_mistakes(outcome, most)}


def _among(predictor: Predictor, folder: str | None) -> Labelled:
    if folder is not None:
        return pictures_in(folder, predictor.classes)
    data = data_of(predictor.trained.path)
    if data is None:
        raise DataError(
            f"The pictures that {predictor.trained.path} was trained on are not here: name a folder with --among, or leave "
            "neighbours out with --neighbours 0."
        )
    return Labelled(data.folder.root, "train", [str(path) for path in data.files("train")], data.labels("train"))


def _number(label: str, classes: Sequence[str]) -> int:
    if label not in classes:
        raise ConfigError(f"Unknown class '{label}'.{did_you_mean(label, classes)} Expected {', '.join(classes[:20])}.")
    return list(classes).index(label)


def _draw(
    predictor: Predictor,
    files: Sequence[str],
    images: Tensor,
    cams: Tensor,
    alike: Neighbours | None,
    first: int,
    true: dict[str, str],
) -> Figure:
    """Draw a page: the picture, where the model looked, and its neighbours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 2 + (alike.labels.shape[1] if alike else 0)
    figure = Figure(figsize=(2 * columns, 2.35 * len(files)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(files), columns, squeeze=False)
    for row, (file, image, cam) in enumerate(zip(files, images, cams, strict=True)):
        best = predictor(image, topk=1)[0]
        said = f"{best.labels[0]} {best.probabilities[0]:.0%}" + (f"\nis {true[file]}" if file in true else "")
        picture = image.permute(1, 2, 0).numpy()
        _show(axes[row][0], picture, f"{Path(file).name}")
        _show(axes[row][1], picture, said)
        axes[row][1].imshow(cam.numpy(), cmap="inferno", alpha=0.55, vmin=0, vmax=1)
        for rank in range(columns - 2):
            assert alike is not None
            other, label = alike.files[first + row][rank], int(alike.labels[first + row][rank])
            shown = predictor.transform(read_image(other, predictor.trained.input_spec.white)).permute(1, 2, 0).numpy()
            _show(axes[row][2 + rank], shown, f"{predictor.classes[label]}\n{alike.similarities[first + row][rank]:.2f}")
    return figure


def _show(axis: Any, picture: Any, title: str) -> None:
    axis.imshow(picture)
    axis.set_title(title.replace("$", r"\$")[:60], fontsize=8)
    axis.set_axis_off()
