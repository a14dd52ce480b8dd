"""How a new head starts: at zero, or as the solution of a linear regression on the features of the training pictures.

The features are those of the frozen pretrained backbone, without augmentation, so the solution is a linear probe that was not
trained but solved; fine-tuning then starts from its accuracy instead of from chance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from finetune.batch_statistics import batchnorm_layers, restate
from finetune.errors import ConfigError
from finetune.freezing import plan
from finetune.labels import classes_of
from finetune.losses import class_weights
from finetune.options import HeadInit
from finetune.randomness import global_seed, seed_of
from finetune.reuse import Kept, activations, frozen_rows
from finetune.timetable import run_length

if TYPE_CHECKING:
    from finetune.module import FinetuneModule

Array = npt.NDArray[np.float64]

_MOST = 20_000  # pictures that a solution is made from: beyond them it hardly changes
_ALPHAS = np.logspace(-3, 5, 17)  # times the mean variance of the features
_C = 0.01  # inverse strength of the logistic regression's regularisation: good from 5 to 200 pictures per class


class Linear(NamedTuple):
    """A linear classifier: logits are features @ weight.T + bias.

    Attributes:
        weight: (K, C).
        bias: (K,).
    """

    weight: Array
    bias: Array

    def accuracy(self, features: Array, labels: npt.NDArray[np.int64]) -> float:
        """Return the share of rows (N, C) that it gives their labels (N,)."""
        return float(((features @ self.weight.T + self.bias).argmax(1) == labels).mean())


def start_head(module: FinetuneModule, trainer: Any, kind: HeadInit) -> str:
    """Set the head of a module before training and return a line that says what was done.

    Args:
        module: The module, whose backbone holds its pretrained weights.
        trainer: Its trainer, with the data module.
        kind: `zero`, `ridge` or `logistic`.

    Raises:
        ConfigError: If the head is not one linear layer, or the data module cannot give the training pictures in order.
    """
    head = module.head
    if not isinstance(head, nn.Linear):
        raise ConfigError(f"model.head_init {kind} needs a linear head, found {type(head).__name__}. Set it to default.")
    if kind == "zero":
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return "head: starts at zero"
    if batchnorm_layers(module.embedding):  # of a bottleneck, which has seen no picture yet
        with _measuring(module, trainer):
            pictures = (cast(Tensor, images) for images, _ in _batches(module, trainer, "train", keep=False))
            restate(module.embedding, pictures, module.features)
    features, labels = split_features(module, trainer, "train")
    if kind == "ridge":
        solution = ridge(features, labels, head.out_features)
    else:
        solution = logistic(features, labels, head.out_features, _weight(module, trainer.datamodule, labels))
    solution = trainer.strategy.broadcast(solution)  # equal to the last bit on all processes
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(solution.weight))
        head.bias.copy_(torch.from_numpy(solution.bias))
    right = solution.accuracy(features, labels)
    module.start_accuracy = solution.accuracy(*split_features(module, trainer, "val")) if _has_val(trainer.datamodule) else None
    held_out = "" if module.start_accuracy is None else f", and {module.start_accuracy:.1%} of the validation pictures"
    return (
        f"head: starts as the {kind} regression on the features of {len(labels)} training pictures ({right:.1%} of them right"
        f"{held_out})"
    )


def _has_val(data: Any) -> bool:
    """Say whether a data module holds pictures for validation; those that do not say are not asked."""
    return bool(getattr(getattr(data, "folder", None), "splits", {}).get("val"))


def _weight(module: FinetuneModule, data: Any, labels: npt.NDArray[np.int64]) -> Array | None:
    """Return a weight per class where training will weigh classes, or show them equally often."""
    if module.objective.weight is not None:
        return cast(Array, module.objective.weight.double().cpu().numpy())
    if getattr(data, "sampling", "natural") != "balanced":
        return None
    counts = np.bincount(labels, minlength=module.hparams["num_classes"]).tolist()
    balanced = class_weights("balanced", counts)
    assert balanced is not None
    return cast(Array, balanced.double().numpy())


def split_features(module: FinetuneModule, trainer: Any, split: Literal["train", "val"]) -> tuple[Array, npt.NDArray[np.int64]]:
    """Return features (N, C) and labels (N,) of a split's pictures without augmentation, at most 20,000 of them.

    Each of several processes computes all of them, so that all heads are equal.

    Raises:
        ConfigError: If the data module has no method `eval_loader`.
    """
    found = []
    with _measuring(module, trainer), torch.inference_mode():
        for images, label in _batches(module, trainer, split):
            found.append((module.features(images).double().cpu().numpy(), label.numpy()))
    return np.concatenate([f for f, _ in found]), np.concatenate([label for _, label in found])


@contextlib.contextmanager
def _measuring(module: FinetuneModule, trainer: Any) -> Iterator[None]:
    """Let a module measure, on its device and in the precision of the run."""
    mode = module.training
    module.to(trainer.strategy.root_device).eval()
    with trainer.precision_plugin.forward_context():
        yield
    module.train(mode)


def _batches(
    module: FinetuneModule, trainer: Any, split: Literal["train", "val"], keep: bool = True
) -> Iterator[tuple[Tensor | Kept, Tensor]]:
    """Yield pictures, or what is kept of them where the run will keep it, and labels."""
    data = trainer.datamodule
    if not hasattr(data, "eval_loader"):
        raise ConfigError(
            f"model.head_init ridge and logistic need the training pictures in order, but {type(data).__name__} has no method "
            "eval_loader('train'). Set model.head_init zero or default."
        )
    loader = data.eval_loader(split)
    number = len(loader.dataset)
    chosen = list(range(number))
    if number > _MOST:
        chosen = sorted(np.random.default_rng(seed_of(global_seed(), "head")).choice(number, _MOST, replace=False).tolist())
    bar: dict[str, Any] = {"desc": "features for the head", "leave": False, "disable": None}
    reuse = getattr(data, "reuse", None)
    first = plan(module.hparams["freezing"], module.stage_names, run_length(trainer))[0]
    line = module.frozen_line(first) if keep and reuse is not None and not reuse.views else None
    rows = frozen_rows(trainer, loader, line, 0, reuse, split) if line and reuse else None
    if rows is None or line is None:
        for batch in tqdm(DataLoader(Subset(loader.dataset, chosen), loader.batch_size, num_workers=loader.num_workers), **bar):
            images, labels = module.images_and_labels(batch)
            yield cast(Tensor, images).to(module.device), classes_of(labels)
        return
    labels = torch.tensor([picture.label for picture in loader.dataset.pictures])
    size = loader.batch_size or 1
    for start in tqdm(range(0, len(chosen), size), **bar):
        indices = chosen[start : start + size]
        yield Kept(activations(rows, indices).to(module.device), line), labels[indices]


_LEAST_SCALE = 0.1
"""Least standard deviation that a feature is divided by, in those of the middle one."""


def ridge(features: Array, labels: npt.NDArray[np.int64], classes: int) -> Linear:
    """Solve a ridge regression of one-hot labels; its strength is chosen, and its logits are scaled, by leaving one out.

    The strength is the one of scikit-learn's RidgeCV, the smallest error on pictures that were left out, among 17 between
    1e-3 and 1e5 times the mean variance of the features. A regression's values are between 0 and 1 and no logits: they are
    multiplied by the factor with the least cross-entropy on pictures that were left out.

    Args:
        features: (N, C).
        labels: (N,).
        classes: Number of classes K.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp
    from sklearn.linear_model import RidgeCV

    target = np.eye(classes)[labels]
    alphas = _ALPHAS * float(features.var(0).mean())
    solver = RidgeCV(alphas=alphas).fit(features, target)
    left_out = target - signed_errors(features, target, float(solver.alpha_))

    def entropy(log_scale: float) -> float:
        logits = np.exp(log_scale) * left_out
        return float((logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels]).mean())

    scale = float(np.exp(minimize_scalar(entropy, bounds=(0.0, 5.0), method="bounded").x))
    return Linear(solver.coef_ * scale, np.atleast_1d(solver.intercept_) * scale)


def signed_errors(features: Array, target: Array, alpha: float) -> Array:
    """Return target minus prediction for each row by a ridge regression on all other rows, (N, K), in closed form.

    With the hat matrix H of all rows, the error on a row that was left out is its error divided by 1 - H_ii.
    """
    centred = features - features.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    shrink = s**2 / (s**2 + alpha)
    mean = target.mean(0)
    fitted = (u * shrink) @ (u.T @ (target - mean)) + mean
    leverage = (u**2 * shrink).sum(1) + 1 / len(target)
    return cast(Array, (target - fitted) / (1 - leverage)[:, None])


def logistic(features: Array, labels: npt.NDArray[np.int64], classes: int, weight: Array | None = None) -> Linear:
    """Solve a multinomial logistic regression (scikit-learn's, C = 0.01) on standardised features.

    A feature that hardly varies in few pictures may vary a lot in others, where it would outvote all: none is enlarged by more
    than ten times what the middle one is.

    Args:
        features: (N, C).
        labels: (N,).
        classes: Number of classes K; those without a picture get a logit that hardly ever wins.
        weight: What a picture of each class counts, (K,); all the same if None.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features)
    varying = np.sqrt(scaler.var_[scaler.var_ > 0])
    scaler.scale_ = np.maximum(scaler.scale_, _LEAST_SCALE * np.median(varying) if len(varying) else 0.0)
    counts = None if weight is None else weight[labels]
    solver = LogisticRegression(C=_C, max_iter=1000).fit(scaler.transform(features), labels, sample_weight=counts)
    coefficients, intercept = solver.coef_ / scaler.scale_, solver.intercept_
    if len(coefficients) == 1:  # of two classes
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercept = np.concatenate([-intercept, intercept]) / 2
    weight, bias = np.zeros((classes, features.shape[1])), np.full(classes, -10.0)
    weight[solver.classes_], bias[solver.classes_] = coefficients, intercept - coefficients @ scaler.mean_
    return Linear(weight, bias)
