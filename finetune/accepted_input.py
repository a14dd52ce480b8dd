"""What a backbone takes in: images with three channels, of a size that its layers were made for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from finetune.errors import ConfigError

_HUB = ("hf-hub:", "hf_hub:", "local-dir:")


def require_plain_name(name: str) -> None:
    """Refuse a name that says where weights lie instead of what network it is.

    Raises:
        ConfigError: If it does.
    """
    prefix = next((prefix for prefix in _HUB if name.startswith(prefix)), None)
    if prefix is not None:
        network = name.removeprefix(prefix).rpartition("/")[2].partition(".")[0]
        raise ConfigError(
            f"The backbone '{name}' names a place of weights. Give the network by its name in timm and its weights apart, such "
            f"as --model.backbone {network or 'resnet18'} --model.weights hub, or --model.weights FILE for a file of yours."
        )


def require_colours(options: Mapping[str, Any]) -> None:
    """Refuse another number of channels than 3: every image is read as RGB, grey ones with three equal channels.

    Args:
        options: Further arguments of the backbone.

    Raises:
        ConfigError: If there are others.
    """
    found = options.get("in_chans", 3)
    if found != 3:
        raise ConfigError(
            f"model.backbone_args has in_chans {found}, but images come with 3 channels (RGB); grey ones have three equal "
            "channels. Leave in_chans out: pretrained weights expect 3 as well."
        )


def require_size(backbone: nn.Module, size: int) -> None:
    """Refuse images of a size that a network of patches was not made for.

    Args:
        backbone: The network.
        size: Height and width of the images.

    Raises:
        ConfigError: If it takes another size only.
    """
    patches: Any = getattr(backbone, "patch_embed", None)
    made_for = getattr(patches, "img_size", None)
    if not getattr(patches, "strict_img_size", False) or not isinstance(made_for, tuple) or set(made_for) == {size}:
        return
    takes = "img_size" in inspect.signature(type(backbone).__init__).parameters
    other = f' Or build it for yours: --model.backbone_args "{{img_size: {size}}}".' if takes else ""
    raise ConfigError(
        f"{type(backbone).__name__} takes images of {made_for[0]} x {made_for[1]} pixels, found {size}. Set --data.image_size "
        f"{made_for[0]}.{other}"
    )
