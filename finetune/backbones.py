"""Create a backbone with random weights from a timm name or from the dotted path of a user's own network."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import timm
import timm.data
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune.accepted_input import require_colours, require_plain_name
from finetune.errors import ConfigError, did_you_mean
from finetune.named_objects import import_path as import_path
from finetune.named_objects import require_network
from finetune.stages import NORM_LAYERS
from finetune.transforms import InputSpec


def create_model(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Create a network with random weights, with a classifier for `num_classes`.

    Args:
        name: A timm model name, or the dotted path of a class or function that returns an `nn.Module`.
        num_classes: Number of classes; passed on as `num_classes` (a dotted path that does not take it keeps its own).
        **options: Further arguments of the model, such as `drop_rate`.

    Raises:
        ConfigError: If the name is not known, or the model does not take the options.
    """
    require_plain_name(name)
    require_colours(options)
    if timm.is_model(name):
        build: Callable[..., Any] = timm.create_model
        arguments: dict[str, Any] = {"model_name": name, "pretrained": False, "num_classes": num_classes}
    elif "." in name and (name.partition(".")[0] not in timm.list_models()):
        build, arguments = import_path(name), {}
        require_network(build, name, nn.Module, _builds_for_torchvision)
        if "num_classes" in _signature(build):
            arguments["num_classes"] = num_classes
    else:
        raise ConfigError(
            f"Unknown backbone '{name}'.{did_you_mean(name, timm.list_models())} Expected the name of a timm model or the "
            "dotted path of your own nn.Module, such as my_package.MyNet."
        )
    try:
        model = build(**arguments, **options)
    except (TypeError, RuntimeError) as error:
        raise ConfigError(f"The backbone '{name}' could not be created with {options or 'its defaults'}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"Expected '{name}' to return an nn.Module, found {type(model).__name__}.")
    return model


def build_bottleneck(in_features: int, width: int | None) -> nn.Module:
    """Return a layer between features and head: linear, BatchNorm, ReLU; the identity if the width is None.

    Raises:
        ConfigError: If the width is below 1.
    """
    if width is None:
        return nn.Identity()
    if width < 1:
        raise ConfigError(f"Expected model.bottleneck to be at least 1, or null for none; found {width}.")
    return nn.Sequential(nn.Linear(in_features, width), nn.BatchNorm1d(width), nn.ReLU())


def _builds_for_torchvision(build: Callable[..., Any]) -> bool:
    name = getattr(build, "__name__", "")
    return name in torchvision.models.list_models() and torchvision.models.get_model_builder(name) is build


def _signature(build: Callable[..., Any]) -> Sequence[str]:
    parameters = inspect.signature(build).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return [*parameters, *(["num_classes"] if takes_all else [])]


def input_spec_of(model: nn.Module) -> InputSpec:
    """Return the input that a timm model's weights expect; for any other network the default."""
    if not hasattr(model, "pretrained_cfg"):
        return InputSpec.default()
    config = timm.data.resolve_model_data_config(model)
    return InputSpec(
        size=int(config["input_size"][-1]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
        crop=float(config["crop_pct"]),
    )


def initialise(
    backbone: nn.Module, head: nn.Module, init: str, *, bn_momentum: float | None = None, bn_eps: float | None = None
) -> None:
    """Start a network's layers and set the constants of its BatchNorm.

    Args:
        backbone: The network without its classifier.
        head: The new head.
        init: `default` leaves the layers as they were created; `kaiming` draws convolutions and the head from He et al. 2015
            (normal, fan-out, ReLU) and sets normalisation layers to one and zero.
        bn_momentum: Momentum of BatchNorm statistics, unless None.
        bn_eps: Epsilon of BatchNorm, unless None.
    """
    for layer in [*backbone.modules(), *head.modules()]:
        if isinstance(layer, _BatchNorm):
            layer.momentum = layer.momentum if bn_momentum is None else bn_momentum
            layer.eps = layer.eps if bn_eps is None else bn_eps
        if init == "kaiming" and isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif init == "kaiming" and isinstance(layer, NORM_LAYERS):
            for name, parameter in layer.named_parameters(recurse=False):
                nn.init.constant_(parameter, 1.0 if name == "weight" else 0.0)


def checkpoint_gradients(backbone: nn.Module, size: int) -> None:
    """Let a timm network compute activations again in the backward pass instead of holding them, in place.

    BatchNorm in the parts that run twice would move its statistics twice in each step. Its momentum m becomes
    1 - sqrt(1 - m), so that two moves are as far as one was.

    Args:
        backbone: The network.
        size: Side of a picture that it accepts, in pixels.

    Raises:
        ConfigError: If the network cannot do so.
    """
    network: Any = backbone
    try:
        network.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        name = type(backbone).__name__
        raise ConfigError(f"{name} cannot checkpoint gradients: set model.grad_checkpointing to false.") from error
    for name in _run_twice(backbone, size):
        norm: Any = backbone.get_submodule(name)
        norm.momentum = 1 - (1 - norm.momentum) ** 0.5


def _run_twice(backbone: nn.Module, size: int) -> list[str]:
    """Return the names of the BatchNorm layers that run both in the forward and in the backward pass."""
    trial = copy.deepcopy(backbone).train()
    norms = {name: module for name, module in trial.named_modules() if isinstance(module, _BatchNorm)}
    before = {name: int(cast(Any, norm).num_batches_tracked) for name, norm in norms.items() if norm.momentum is not None}
    with torch.random.fork_rng(devices=[]):
        like = next(trial.parameters())
        trial(torch.rand(2, 3, size, size, device=like.device, dtype=like.dtype)).sum().backward()
    return [name for name, count in before.items() if int(cast(Any, norms[name]).num_batches_tracked) - count == 2]
