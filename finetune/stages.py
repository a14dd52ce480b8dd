"""A backbone as an ordered list of named stages.

Learning rates, freezing, gradient flow and the reuse of frozen work all speak in stages, and nothing else does the grouping. A
timm model is grouped by its own coarse `group_matcher`; any other `nn.Module` by its children. The classifier is taken off
the model, so that a backbone maps pictures to features and the head, a plain linear layer, maps features to logits.

    stem → layer1 → layer2 → layer3 → layer4 → [neck] → features → head
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from finetune.errors import ConfigError, did_you_mean

HEAD = "head"
NECK = "neck"
NORM_LAYERS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Stage:
    """One stage of a backbone: names only, so that it survives copies and moves of the network.

    Attributes:
        name: The name that options use, such as `layer4`.
        modules: The largest sub-modules that lie wholly inside the stage, in the order of their definition.
        parameters: The names of all its parameters.
    """

    name: str
    modules: tuple[str, ...]
    parameters: tuple[str, ...]

    def holds(self, tensor: str) -> bool:
        """Say whether a parameter or buffer of the backbone belongs to the stage."""
        return tensor in self.parameters or tensor.startswith(tuple(f"{module}." for module in self.modules))


@dataclass(frozen=True)
class Classifier:
    """What was taken off the model to make room for the head: its name in the model and the width of its input."""

    name: str
    in_features: int


def split_head(model: nn.Module) -> tuple[Classifier, tuple[Stage, ...]]:
    """Take the classifier off a model, in place, and group what remains into ordered stages.

    The classifier is `model.get_classifier()` where the model has that (timm's contract), otherwise the last linear layer; it
    is replaced by the identity, so that the model returns features. timm's last coarse group may hold more than the classifier
    (a final normalisation, an attention pool): what remains of it is the stage `neck`.

    Returns:
        What was taken off, and the stages in the order of the forward pass.

    Raises:
        ConfigError: If there is no single linear classifier, or nothing besides it.
    """
    classifier = _find_classifier(model)
    keys = _group(model, classifier.name)
    parent, _, child = classifier.name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    if not keys:
        raise ConfigError(f"{type(model).__name__} has no parameters besides its classifier: there is nothing to fine-tune.")
    members: dict[int | str, list[str]] = {}
    for name, key in keys.items():
        members.setdefault(key, []).append(name)
    if NECK in members:
        members[NECK] = members.pop(NECK)  # whatever the order of definition, it stands before the head
    stages: list[Stage] = []
    for key, parameters in members.items():
        name = key if isinstance(key, str) else _stage_name(parameters[0], [s.name for s in stages])
        stages.append(Stage(name, _maximal_modules(model, set(parameters)), tuple(parameters)))
    return classifier, tuple(stages)


def _find_classifier(model: nn.Module) -> Classifier:
    network: Any = model
    own = network.get_classifier() if hasattr(model, "get_classifier") else None
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    found = [(n, m) for n, m in model.named_modules() if m is own] if isinstance(own, nn.Module) else linear[-1:]
    name, layer = found[0] if found else ("", None)
    if not name or not isinstance(layer, nn.Linear | nn.Conv2d):
        raise ConfigError(
            f"{type(model).__name__} has no linear classifier that could be replaced by the head: expected get_classifier() to "
            f"return a Linear or 1x1 Conv2d, or a last nn.Linear, found {type(own or layer).__name__}."
        )
    return Classifier(name, layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)


def _group(model: nn.Module, classifier: str) -> dict[str, int | str]:
    """Map each parameter outside the classifier to the key of its stage: a ready name, or timm's group number."""
    head = f"{classifier}."
    names = [name for name, _ in model.named_parameters() if not name.startswith(head)]
    if not hasattr(model, "group_matcher"):
        outer = classifier.partition(".")[0]
        children = {name: name.partition(".")[0] for name in names}
        return {name: NECK if child == outer else child for name, child in children.items()}
    matcher = cast(Any, model).group_matcher(coarse=True)
    groups = group_parameters(model, matcher, reverse=True)
    with_head = next(group for name, group in groups.items() if name.startswith(head))
    named = {groups[name]: "stem" for name in names[:1]} | {with_head: NECK}
    return {name: named.get(groups[name], groups[name]) for name in names}


def _stage_name(parameter: str, taken: Sequence[str]) -> str:
    """Name a stage by its first parameter.

    >>> _stage_name("layer4.0.conv1.weight", []), _stage_name("blocks.6.0.bn.bias", [])
    ('layer4', 'blocks.6')
    >>> _stage_name("features.denseblock2.conv.weight", ["features"])
    'features.denseblock2'
    """
    parts = parameter.split(".")[:-1] or [parameter]
    numbered = len(parts) > 1 and parts[1].isdigit() and not parts[0][-1].isdigit()
    for depth in range(2 if numbered else 1, len(parts) + 1):
        name = ".".join(parts[:depth])
        if name not in (*taken, HEAD, NECK):
            return name
    return f"{parts[0]}_{len(taken)}"


def _maximal_modules(backbone: nn.Module, parameters: set[str]) -> tuple[str, ...]:
    inside: list[str] = []
    for name, module in backbone.named_modules():
        own = [f"{name}.{n}" if name else n for n, _ in module.named_parameters()]
        nested = any(name.startswith(f"{outer}.") for outer in inside)
        if own and name and not nested and parameters.issuperset(own):
            inside.append(name)
    return tuple(inside)


def norm_parameters(module: nn.Module) -> set[str]:
    """Return the names of the affine parameters of all normalisation layers."""
    return {
        f"{name}.{parameter}" if name else parameter
        for name, layer in module.named_modules()
        if isinstance(layer, NORM_LAYERS)
        for parameter, _ in layer.named_parameters(recurse=False)
    }


def require_stage(name: str, stages: Sequence[str]) -> str:
    """Return the name if it is one of the stages.

    Raises:
        ConfigError: If it is not; the message lists the stages and the nearest one.
    """
    if name not in stages:
        raise ConfigError(f"There is no stage '{name}'.{did_you_mean(name, stages)} The stages are: {', '.join(stages)}.")
    return name
