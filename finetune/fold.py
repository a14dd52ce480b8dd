"""A convolution and the BatchNorm behind it, in eval mode, are one convolution; a frozen network is faster that way."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

TOLERANCE = 1e-5
"""Largest difference of the outputs, relative to their largest value, at which a folded network is used."""


def folded(network: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy of a network in eval mode with BatchNorm folded into the convolutions before it.

    The copy has the same modules under the same names. Pairs are found by running the network: a BatchNorm whose input is the
    very output of a convolution. Where the copy differs from the network by more than `TOLERANCE`, it is the network unfolded.

    Args:
        network: The network; it is left as it is.
        images: An input (N, …) to find the pairs with and to compare the outputs on.
    """
    plain = copy.deepcopy(network).eval().requires_grad_(False)
    with torch.no_grad():
        pairs = _pairs(plain, images)
        quick = copy.deepcopy(plain)
        for conv, norm in pairs:
            _fold(quick, conv, norm)
        wanted, found = plain(images), quick(images)
    scale = wanted.abs().max().clamp_min(1e-12)
    return quick if bool((wanted - found).abs().max() <= TOLERANCE * scale) else plain


def _pairs(network: nn.Module, images: Tensor) -> list[tuple[str, str]]:
    """Return the names of each convolution and the BatchNorm that alone takes its output; both must run just once."""
    outputs: dict[int, tuple[str, Tensor]] = {}  # the tensors are held, so that no two have the same id
    calls: dict[str, int] = {}
    pairs: list[tuple[str, str]] = []

    def after(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            outputs[id(output)] = name, output

        return hook

    def before(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            calls[name] = calls.get(name, 0) + 1
            if id(inputs[0]) in outputs:
                pairs.append((outputs[id(inputs[0])][0], name))

        return hook

    handles = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(after(name)))
        elif isinstance(module, _BatchNorm) and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(before(name)))
    try:
        network(images)
    finally:
        for handle in handles:
            handle.remove()
    return [(conv, norm) for conv, norm in pairs if calls[conv] == calls[norm] == 1]


def _fold(network: nn.Module, conv_name: str, norm_name: str) -> None:
    conv: Any = network.get_submodule(conv_name)
    norm: Any = network.get_submodule(norm_name)
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    parent, _, child = norm_name.rpartition(".")
    rest = [
        part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None
    ]  # timm's BatchNormAct2d
    setattr(network.get_submodule(parent), child, nn.Sequential(*rest) if rest else nn.Identity())
