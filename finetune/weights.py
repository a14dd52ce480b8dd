"""Where the weights of a network come from, and what of them was used.

    auto     the first of hub, bundled and package that has some, otherwise an error that names the remedies
    hub      timm's pretrained weights: from the local cache, otherwise from the hub if it answers within seconds
    bundled  what comes along with this package
    package  what an installed package brings
    none     random values
    FILE     .safetensors, .pth, .pt or .bin with the names of timm or torchvision, or a .ckpt of this toolkit

Nothing is lost silently: a source must fit completely unless the user accepts less, and a `Report` says what was kept, dropped
and missing. Code inside a file is never run. A source that is refused leaves the network as it was.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from finetune.errors import WeightsError
from finetune.finite import require_finite
from finetune.stages import HEAD, Stage
from finetune.weight_files import OPTION, sha256_of
from finetune.weight_report import Report, grouped
from finetune.weight_sources import open_source

_WRAPPERS = ("module", "_orig_mod", "model", "backbone")
_COUNTER = "num_batches_tracked"  # of BatchNorm; older files lack it, and nothing is computed from it by default


@dataclass
class _Match:
    """What of a source fits a backbone."""

    use: dict[str, Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unlike: dict[str, str] = field(default_factory=dict)  # name -> both shapes
    unused: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)


def load_weights(
    backbone: nn.Module,
    head: nn.Linear,
    *,
    source: str,
    backbone_name: str,
    classifier: str,
    stages: Sequence[Stage],
    partial: bool = False,
    backbone_options: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
) -> Report:
    """Fill a backbone, and the head if the source has one of the same shape, in place.

    Args:
        backbone: The network without its classifier, with random weights.
        head: The linear layer on its features.
        source: `auto`, `hub`, `bundled`, `package`, `none` or a path, see the module's text.
        backbone_name: The name that the backbone was created by.
        classifier: The name of the layer that was taken off, such as `fc`.
        stages: The stages of the backbone.
        partial: Accept a file or checkpoint that does not fit completely, as long as something does.
        backbone_options: The options that the backbone was created with.
        class_names: The classes of the head, if known; the head of a checkpoint with other classes is not used.

    Raises:
        WeightsError: If there are no such weights, or they cannot be read safely or do not fit.
    """
    wanted = backbone.state_dict()
    if source == "none":
        names = tuple(name for name in wanted if not name.endswith(_COUNTER))
        return Report("none", None, None, 0, (), names, (), "new", tuple(stage.name for stage in stages))
    opened = open_source(source, backbone_name, backbone_options or {}, class_names)
    found = _unwrapped(opened.tensors, wanted)
    stem = next((name for name, p in backbone.named_parameters() if p.ndim == 4), "")
    match = _match(found, wanted, stem)
    new_head, in_file = _match_head({name: found[name] for name in match.unused}, head, classifier)
    match.unused = [name for name in match.unused if name not in in_file]
    if not match.use or (not partial and (match.missing or match.unused)):
        raise WeightsError(_refusal(match, found, wanted, f"'{opened.location}'", backbone_name))
    require_finite({**match.use, **new_head}, f"'{opened.location}'", WeightsError)
    keep_head = bool(new_head) and opened.same_classes
    backbone.load_state_dict(match.use, strict=False)
    if keep_head:
        head.load_state_dict(new_head)
        match.reshaped += [name for name in in_file if found[name].ndim == 4]
    return Report(
        source=opened.kind,
        location=opened.location,
        sha256=sha256_of(opened.path),
        kept=sum(not name.endswith(_COUNTER) for name in match.use),
        dropped=(*match.unused, *match.unlike, *([] if keep_head else in_file), *opened.others),
        missing=tuple(match.missing),
        reshaped=tuple(match.reshaped),
        head="from the weights" if keep_head else "new",
        untrained=tuple(stage.name for stage in stages if any(stage.holds(name) for name in match.missing)),
        input=opened.input,
        note=opened.note,
    )


def _unwrapped(found: Mapping[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """Strip what wrappers put before the names, if with it no name fits and without it some do.

    >>> list(_unwrapped({"module.model.fc.bias": 0, "module.head.bias": 1}, ["fc.bias"]))
    ['fc.bias', 'head.bias']
    """
    wanted = set(wanted)
    if wanted.intersection(found):
        return dict(found)
    heads = {match[0] for name in found if (match := re.match(rf"(?:(?:{'|'.join(_WRAPPERS)})\.)+", name))}
    prefixes = {".".join(head.split(".")[:depth]) + "." for head in heads for depth in range(1, head.count(".") + 1)}
    fits = Counter({p: sum(name.startswith(p) and name.removeprefix(p) in wanted for name in found) for p in prefixes})
    best = max(sorted(fits), key=fits.__getitem__, default="")
    parts = best.split(".")[:-1] if fits[best] else []
    stripped = {}
    for name, tensor in found.items():
        for part in parts:
            name = name.removeprefix(f"{part}.")
        stripped[name] = tensor
    return stripped if len(stripped) == len(found) else dict(found)


def _match(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], stem: str) -> _Match:
    match = _Match(unused=[name for name in found if name not in wanted and not name.endswith(_COUNTER)])
    for name, target in wanted.items():
        tensor = _fit(found[name], target, name == stem) if name in found else None
        if tensor is not None:
            match.use[name] = tensor
            match.reshaped += [name] * (tensor.shape != found[name].shape)
        elif not name.endswith(_COUNTER):
            match.missing.append(name)
            if name in found:
                match.unlike[name] = f"{_shape(found[name])} for {_shape(target)}"
    if all(name.endswith(_COUNTER) for name in match.use):
        match.use.clear()
    return match


def _fit(tensor: Tensor, target: Tensor, stem: bool) -> Tensor | None:
    """Return the tensor in the shape of the target, or None if that cannot be done without a loss."""
    if tensor.is_floating_point() != target.is_floating_point():
        return None
    if tensor.shape == target.shape:
        return tensor
    if {tensor.ndim, target.ndim} == {2, 4} and tensor.numel() == target.numel() and tensor.shape[:2] == target.shape[:2]:
        return tensor.reshape(target.shape)  # a 1x1 convolution is a linear layer
    if stem and tensor.ndim == 4 and (tensor.shape[0], *tensor.shape[2:]) == (target.shape[0], *target.shape[2:]):
        return _adapt_channels(tensor, target.shape[1])
    return None


def _adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Make a stem for other input channels as timm's `adapt_input_conv` does, which needs 3 on one side before timm 1.0.31."""
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    repeated = weight.repeat(1, math.ceil(channels / weight.shape[1]), 1, 1)[:, :channels]
    return repeated * (weight.shape[1] / channels)


def _match_head(unused: Mapping[str, Tensor], head: nn.Linear, classifier: str) -> tuple[dict[str, Tensor], list[str]]:
    """Return what fills the head, empty if it does not fit, and the names of the classifier's tensors in the source."""
    for prefix in (classifier, HEAD):
        inside = {part: f"{prefix}.{part}" for part in ("weight", "bias") if f"{prefix}.{part}" in unused}
        if inside:
            wanted = head.state_dict()
            fitting = {p: _fit(unused[name], wanted[p], stem=False) for p, name in inside.items() if p in wanted}
            use = {part: tensor for part, tensor in fitting.items() if tensor is not None}
            return (use if set(use) == set(wanted) == set(inside) else {}), list(inside.values())
    return {}, []


def _refusal(match: _Match, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str, name: str) -> str:
    if not match.use and not match.unlike:
        expected, had = (", ".join(list(names)[:3]) for names in (wanted, found))
        return (
            f"None of the {len(found)} tensors in {where} fits {name}. Expected names such as {expected}, found {had}. Give "
            f"{OPTION} the weights of this architecture, or set --model.backbone to theirs."
        )
    absent = [n for n in match.missing if n not in match.unlike]
    shapes = [f"{n} {both}" for n, both in match.unlike.items()]
    parts = [
        f"{len(absent)} missing: {grouped(absent)}" if absent else "",
        f"{len(match.unused)} unexpected: {grouped(match.unused)}" if match.unused else "",
        f"{len(shapes)} of another shape (found for expected): {'; '.join(shapes[:6])}" if shapes else "",
        f"and {len(shapes) - 6} more: {grouped(match.unlike)}" if len(shapes) > 6 else "",
    ]
    accept = "To use what fits and start the rest from random values, set --model.partial_weights true." if match.use else ""
    listing = [f"  {part}" for part in parts if part]
    opening = f"The weights in {where} do not fit {name}. Expected all of its tensors and no others, found"
    return "\n".join([opening, *listing, *([accept] if accept else [])])


def _shape(tensor: Tensor) -> str:
    return f"{list(tensor.shape)}" if tensor.is_floating_point() else f"{list(tensor.shape)} of {tensor.dtype}"
