"""timm's pretrained weights: in the cache of this machine, or on the hub if it answers within seconds."""

from __future__ import annotations

import contextlib
import difflib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub as hf
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError
from timm.models import PretrainedCfg, get_pretrained_cfg

from finetune.errors import WeightsError
from finetune.weight_files import FILES, OPTION

PROBE_SECONDS = 4.0  # how long the hub may take to answer, with name resolution


def available(backbone_name: str) -> bool:
    """Say within seconds whether a backbone's weights are in the cache, or on a hub that answers."""
    try:
        cfg = pretrained_cfg(backbone_name)
    except WeightsError:
        return False
    return cached_file(cfg) is not None or answers_for(cfg)


def answers_for(cfg: PretrainedCfg) -> bool:
    """Say within seconds whether the server that holds the weights answers."""
    return _answers(_address(cfg))


def pretrained_cfg(name: str) -> PretrainedCfg:
    """Return timm's description of the pretrained weights of a model.

    Raises:
        WeightsError: If there are none; the message names models that have some.
    """
    if not timm.is_model(name):
        raise WeightsError(
            f"'{name}' is a network of your own, for which the hub has no weights. Give {OPTION} the path of a {FILES} "
            f"file, or {OPTION} none to start from random values."
        )
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError:  # the tag after the dot is unknown
        cfg = None
    if cfg is not None and cfg.has_weights:
        return cfg
    known = timm.list_pretrained()
    architecture = name.partition(".")[0]
    near = [n for n in known if n.partition(".")[0] == architecture]
    near = near or difflib.get_close_matches(architecture, sorted({n.partition(".")[0] for n in known}), n=5, cutoff=0.5)
    raise WeightsError(
        f"timm has no pretrained weights for '{name}'. Near names with weights: {', '.join(near[:8]) or 'none'}. Set "
        f"--model.backbone to one of them, give {OPTION} a {FILES} file, or {OPTION} none to start from random values."
    )


def _filenames(cfg: PretrainedCfg) -> tuple[str, ...]:
    return (cfg.hf_hub_filename,) if cfg.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")


def cached_file(cfg: PretrainedCfg) -> Path | None:
    """Return the file of the weights if it is on this machine; this never uses the network."""
    repository, _, revision = (cfg.hf_hub_id or "").partition("@")
    for name in _filenames(cfg) if repository else ():
        found = hf.try_to_load_from_cache(repository, name, cache_dir=constants.HF_HUB_CACHE, revision=revision or None)
        if isinstance(found, str):
            return Path(found)
    path = _torch_cache(cfg)
    return path if cfg.url and path.is_file() else None


def _torch_cache(cfg: PretrainedCfg) -> Path:
    return Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(str(cfg.url)).path).name)


def _address(cfg: PretrainedCfg) -> str:
    return constants.ENDPOINT if cfg.hf_hub_id else str(cfg.url)


def _answers(address: str) -> bool:
    """Say whether a server answers, after `PROBE_SECONDS` at most even where the name resolution hangs."""
    status: list[int] = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # the hub's client changed its library, and with it its errors, more than once
            status.append(hf.get_session().head(address, timeout=PROBE_SECONDS).status_code)

    if not constants.HF_HUB_OFFLINE:
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(PROBE_SECONDS)
    return bool(status) and status[0] < 500 and status[0] not in (403, 407)  # which is how a proxy says no


def download(cfg: PretrainedCfg, name: str, remedies: Sequence[str] = ()) -> Path:
    """Fetch the file of the weights into the cache.

    Args:
        cfg: The description of the weights.
        name: The backbone.
        remedies: What else the user can do if that fails.

    Raises:
        WeightsError: If the hub does not answer in time or the download fails; the message names the remedies.
    """
    reason = (
        "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{_address(cfg)} does not answer within {PROBE_SECONDS:g} s"
    )
    if answers_for(cfg):
        try:
            return _fetch(cfg)
        except Exception as error:  # see _answers
            reason = f"the download failed: {type(error).__name__}: {error}".partition("\n")[0]
    repository, _, _ = (cfg.hf_hub_id or "").partition("@")
    place = Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}") if repository else _torch_cache(cfg)
    remedies = [
        *remedies,
        f"run once on a machine with network and copy what appears there in its cache to '{place}'",
        f"copy any {FILES} file with weights of {name} here and set {OPTION} FILE",
        f"set {OPTION} none to start from random values",
    ]
    listing = "".join(f"\n  - {remedy}" for remedy in remedies)
    raise WeightsError(f"The hub's weights of {name} are not on this machine, and {reason}. Do one of these:{listing}")


def _fetch(cfg: PretrainedCfg) -> Path:
    repository, _, revision = (cfg.hf_hub_id or "").partition("@")
    if not repository:
        path = _torch_cache(cfg)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(str(cfg.url), str(path), progress=False)
        return path
    options: dict[str, Any] = {"revision": revision or None, "cache_dir": constants.HF_HUB_CACHE, "etag_timeout": PROBE_SECONDS}
    *safer, last = _filenames(cfg)
    for name in safer:
        with contextlib.suppress(EntryNotFoundError):
            return Path(hf.hf_hub_download(repository, name, **options))
    return Path(hf.hf_hub_download(repository, last, **options))
