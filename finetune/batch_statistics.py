"""BatchNorm statistics of other pictures than those that a network was trained on (AdaBN, Li et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batchnorm_layers(network: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm layers that keep statistics, by name."""
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, _BatchNorm)}
    return {name: layer for name, layer in layers.items() if layer.track_running_stats}


def statistics_of(network: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the statistics of all BatchNorm layers, by the names of the buffers."""
    return {
        f"{name}.{part}": buffer.clone()
        for name, layer in batchnorm_layers(network).items()
        for part, buffer in layer.named_buffers(recurse=False)
    }


def put_statistics(network: nn.Module, statistics: dict[str, Tensor]) -> None:
    """Put statistics that `statistics_of` returned back into a network."""
    for name, values in statistics.items():
        network.get_buffer(name).copy_(values)


@torch.no_grad()
def restate(network: nn.Module, batches: Iterable[Tensor], forward: Callable[[Tensor], Tensor]) -> None:
    """Replace the statistics of all BatchNorm layers by the means over pictures; nothing else of the network changes.

    Args:
        network: The network, in any mode; modes are as they were afterwards.
        batches: Pictures.
        forward: What passes pictures through the network.
    """
    layers = batchnorm_layers(network).values()
    modes = {module: module.training for module in network.modules()}
    momenta = {layer: layer.momentum for layer in layers}
    network.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
    seen = 0
    try:
        for images in batches:
            seen += len(images)
            for layer in layers:
                layer.momentum = len(images) / seen  # all pictures count the same, also those of a smaller batch
            forward(images)
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum
        for module, training in modes.items():
            module.training = training
    if torch.distributed.is_initialized():  # each process has seen its share of the pictures
        for name in statistics_of(network):
            buffer = network.get_buffer(name)
            if buffer.is_floating_point():
                torch.distributed.all_reduce(buffer)
                buffer.div_(torch.distributed.get_world_size())
