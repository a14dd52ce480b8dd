"""What happens to a picture between the file and the batch: uint8 tensors in, uint8 tensors of one size out.

Mean and standard deviation are part of the description of an input, yet are not applied here: the module owns normalisation.
All randomness comes from torch's global generator, so a caller that seeds it per picture gets the same picture each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from msgspec import Meta
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from finetune.errors import ConfigError, did_you_mean
from finetune.images import FULL
from finetune.schema import convert

Augmentation = Literal["none", "light", "medium", "strong"]
Transform = Callable[[Tensor], Tensor]

Scale = Annotated[float, Meta(gt=0)]
_MOST_PIXELS = 8192  # of a side that a file may ask for

LONGEST = 4  # a picture is cut to this ratio of its sides before it is resized, so that 1 x 3000 pixels need no gigabyte


@dataclass(frozen=True)
class InputSpec:
    """The input that weights expect.

    Attributes:
        size: Height and width in pixels.
        mean: Mean per colour (RGB), for values between 0 and 1.
        std: Standard deviation per colour.
        interpolation: How pictures are resized.
        crop: Share of the shorter side that evaluation keeps: it resizes that side to `size / crop` and cuts out the centre.
        white: The value of 16-bit grey that is white, see `images.read_image`.

    >>> InputSpec.default().size
    224
    """

    size: Annotated[int, Meta(le=_MOST_PIXELS)]
    mean: tuple[float, float, float]
    std: tuple[Scale, Scale, Scale]
    interpolation: Literal["bilinear", "bicubic"]
    crop: float
    white: int = FULL

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"Expected an input size of at least 1 pixel, found {self.size}.")
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)):
            raise ConfigError(f"Expected a finite mean and standard deviation per colour, found {self.mean} and {self.std}.")
        if not 0 < self.crop <= 1:
            raise ConfigError(f"Expected a crop above 0 and up to 1 (the share of the shorter side), found {self.crop}.")
        if not 1 <= self.white <= FULL:
            raise ConfigError(f"Expected a white value between 1 and {FULL}, found {self.white}.")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ConfigError(f"Expected the interpolation 'bilinear' or 'bicubic', found '{self.interpolation}'.")

    @classmethod
    def from_plain(cls, fields: Mapping[str, Any]) -> InputSpec:
        """Restore a description that was kept as plain values, as in a checkpoint or on a card.

        Raises:
            ConfigError: If they describe no input.

        >>> InputSpec.from_plain(dict(size=96, mean=[0.5] * 3, std=[0.5] * 3, interpolation="bilinear", crop=0.875)).mean
        (0.5, 0.5, 0.5)
        """
        return convert(fields, cls, "the input of a model", error=ConfigError)

    @classmethod
    def default(cls) -> InputSpec:
        """Return the classic ImageNet input, for a model that does not say what it expects."""
        return cls(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", 0.875)


def eval_transform(spec: InputSpec) -> Transform:
    """Resize the shorter side and cut out the centre, as the weights were evaluated; no randomness.

    Args:
        spec: The input that the weights expect.

    Returns:
        uint8 (3, height, width) -> uint8 (3, size, size).

    >>> import torch
    >>> eval_transform(InputSpec.default())(torch.zeros(3, 1, 3000, dtype=torch.uint8)).shape
    torch.Size([3, 224, 224])
    """
    shorter = math.floor(spec.size / spec.crop)
    resize = v2.Resize(shorter, interpolation=InterpolationMode(spec.interpolation), antialias=True)
    transform: Transform = v2.Compose([CutLongSide(LONGEST), resize, v2.CenterCrop(spec.size)])
    return transform


def train_transform(spec: InputSpec, level: Augmentation, hflip: bool = True) -> Transform:
    """Vary a picture at random; `none` is the transform of evaluation.

    Levels, each a random crop, resized (Szegedy et al. 2015), and a mirror image half of the time:

    * `light`: crops of 60 to 100 % of the area.
    * `medium`: crops of 30 to 100 %, and a mild change of brightness, contrast and saturation.
    * `strong`: crops of 20 to 100 %, one operation of TrivialAugment (Müller & Hutter 2021) at a random strength, and a
      rectangle erased in a quarter of the pictures (Zhong et al. 2020).

    Args:
        spec: The input that the weights expect.
        level: How much the pictures vary.
        hflip: Whether mirror images are the same class (not so for digits, letters and signs).

    Returns:
        uint8 (3, height, width) -> uint8 (3, size, size).

    Raises:
        ConfigError: If the level is unknown.
    """
    levels = get_args(Augmentation)
    if level not in levels:
        raise ConfigError(f"Unknown augmentation '{level}'.{did_you_mean(level, levels)} Expected {', '.join(levels)}.")
    if level == "none":
        return eval_transform(spec)
    transform: Transform = v2.Compose([random_crop(spec, level, hflip), *change_look(spec, level)])
    return transform


def random_crop(spec: InputSpec, level: Augmentation, hflip: bool = True) -> nn.Module:
    """Return the first part of `train_transform`: where the picture is cut, and whether it is mirrored.

    Seeded alike, it cuts alike whatever the size of the input, so that two networks can see the same part of a picture.
    """
    smallest = {"light": 0.6, "medium": 0.3, "strong": 0.2}[level]
    crop = v2.RandomResizedCrop(spec.size, (smallest, 1.0), interpolation=InterpolationMode(spec.interpolation), antialias=True)
    together: nn.Module = v2.Compose([crop, *([v2.RandomHorizontalFlip()] if hflip else [])])
    return together


def change_look(spec: InputSpec, level: Augmentation) -> list[nn.Module]:
    """Return the second part of `train_transform`: what changes of a picture after it was cut."""
    if level == "medium":
        return [v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2)]
    if level == "strong":
        grey: Any = [round(255 * mean) for mean in spec.mean]  # 0 after normalisation
        bilinear = InterpolationMode.BILINEAR
        return [v2.TrivialAugmentWide(interpolation=bilinear, fill=grey), v2.RandomErasing(p=0.25, value=grey)]
    return []


class CutLongSide(nn.Module):
    """Cut both ends of a very long picture, of which the centre crop would keep nothing anyway."""

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.longest = longest

    def forward(self, image: Tensor) -> Tensor:
        """Return the centre of a (3, height, width) picture; no side is more than `longest` times the other."""
        height, width = image.shape[-2:]
        limit = self.longest * min(height, width)
        top, left = max(0, height - limit) // 2, max(0, width - limit) // 2
        return image[..., top : top + min(height, limit), left : left + min(width, limit)]
