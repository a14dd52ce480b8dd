"""What weights there are here and now, for one backbone or for all, and what to type to use them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import timm
from tabulate import tabulate
from timm.models import get_pretrained_cfg

from finetune import hub, package_weights
from finetune.bundled_weights import REINSTALL, bundled_card, bundled_file, bundled_names
from finetune.errors import ConfigError, WeightsError, did_you_mean
from finetune.package_weights import ARCHITECTURE, INSTALL, LICENCE, has_package, installed, package_file
from finetune.store import format_bytes

_OWN_LICENCE = "Apache-2.0"  # of what comes along with this package


class Entry(NamedTuple):
    """One place with weights, as a row of the table."""

    backbone: str
    source: str
    state: str
    size: str
    licence: str
    use: str


def weights_table(backbone: str | None = None) -> str:
    """Return a table of the weights of a backbone, or of all that are on this machine; it takes as long as the hub's answer.

    Raises:
        ConfigError: If timm has no such model.
    """
    if backbone is None:
        entries = [*map(_bundled, bundled_names()), _package(ARCHITECTURE), *_all_cached()]
        closing = "All that timm knows, also on the hub, by name: resnet-finetune weights BACKBONE"
    else:
        entries = list(_of(backbone))
        closing = "--model.weights auto takes the first of hub (cached or reachable), bundled and package that has some."
    return f"{tabulate(entries, headers=[*Entry._fields[:-1], 'what to type'], disable_numparse=True)}\n\n{closing}"


def licence_of(source: str, backbone: str) -> str:
    """Return the licence of pretrained weights, as far as their source states it.

    Args:
        source: hub, bundled, package, file, checkpoint or none.
        backbone: Whose weights.
    """
    if source == "bundled":
        return str(bundled_card(backbone).get("licence") or _OWN_LICENCE)
    if source == "package":
        return LICENCE
    stated = get_pretrained_cfg(backbone) if source == "hub" and timm.is_model(backbone) else None
    return (stated and stated.license) or ("that of the file" if source in ("file", "checkpoint") else "not stated")


def _of(backbone: str) -> Iterator[Entry]:
    if not timm.is_model(backbone):
        raise ConfigError(
            f"timm has no model '{backbone}'.{did_you_mean(backbone, timm.list_models())} For a network of your own give "
            "--model.weights FILE."
        )
    try:
        cfg = hub.pretrained_cfg(backbone)
    except WeightsError:
        yield Entry(backbone, "hub", "has none of this name", "", "", "")
    else:
        path = hub.cached_file(cfg)
        yield _cached(backbone, path) if path else Entry(backbone, "cached", "no", "", "", "")
        reachable = hub.answers_for(cfg)
        use = _options(backbone, "hub") if reachable else ""
        yield Entry(backbone, "hub", "reachable" if reachable else "does not answer", "", cfg.license or "not stated", use)
    yield _bundled(backbone) if backbone in bundled_names() else Entry(backbone, "bundled", "no", "", "", "")
    yield _package(backbone) if has_package(backbone) else Entry(backbone, "package", "no", "", "", "")


def _all_cached() -> Iterator[Entry]:
    for name in timm.list_pretrained():
        if path := hub.cached_file(get_pretrained_cfg(name)):
            yield _cached(name, path)


def _cached(backbone: str, path: Path) -> Entry:
    return Entry(backbone, "cached", "yes", _size(path), licence_of("hub", backbone), _options(backbone, "hub"))


def _bundled(backbone: str) -> Entry:
    try:
        path = bundled_file(backbone)
        licence = licence_of("bundled", backbone)
    except WeightsError:
        return Entry(backbone, "bundled", "damaged", "", "", REINSTALL)
    return Entry(backbone, "bundled", "yes", _size(path), licence, _options(backbone, "bundled"))


def _package(backbone: str) -> Entry:
    if installed() is None:
        return Entry(backbone, "package", "not installed", "", LICENCE, INSTALL)
    try:
        path = package_file(backbone)
    except WeightsError:
        return Entry(backbone, "package", "damaged", "", LICENCE, package_weights.REINSTALL)
    return Entry(backbone, "package", "yes", _size(path), LICENCE, _options(backbone, "package"))


def _size(path: Path) -> str:
    return format_bytes(path.stat().st_size)


def _options(backbone: str, source: str) -> str:
    return f"--model.backbone {backbone} --model.weights {source}"
