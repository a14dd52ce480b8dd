"""Which axes of an activation are channels and which are places in the image.

Convolutional networks hand on (N, C, H, W), Swin and MambaOut (N, H, W, C), vision transformers (N, tokens, C) with class and
register tokens before those of the patches, and what was pooled has no places at all. Nothing in a shape says which of them it
is. Images of two heights and two widths do: the axis that grows with the height is the height. Where a network takes images of
one size only, timm's description of it and the shape decide, and where these leave a doubt the layout is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from finetune.errors import ConfigError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ActivationLayout:
    """The meaning of the axes of an activation, of which the first is the batch.

    Attributes:
        channels: Number of channels.
        channel_axis: The axis of the channels.
        place_axes: The axes of height and width; one axis of tokens, row by row; none if there are no places.
        stride: Pixels of the image from one place to the next; None if there are no places.
        prefix: Tokens before those of the patches, such as the class token.
        unknown: Why the axes could not be told apart; empty if they could.

    >>> ActivationLayout(768, 3, (1, 2), 32).kind, ActivationLayout(192, 2, (1,), 16, prefix=1).kind
    ('nhwc', 'tokens')
    """

    channels: int
    channel_axis: int = 1
    place_axes: tuple[int, ...] = ()
    stride: int | None = None
    prefix: int = 0
    unknown: str = ""

    @property
    def spatial(self) -> bool:
        """Whether the activation has places in the image."""
        return bool(self.place_axes)

    @property
    def kind(self) -> Literal["nchw", "nhwc", "tokens", "vector", "unknown"]:
        """The usual name of the layout."""
        if self.unknown:
            return "unknown"
        if not self.place_axes:
            return "vector"
        return "tokens" if len(self.place_axes) == 1 else "nchw" if self.channel_axis == 1 else "nhwc"

    def maps(self, activation: Tensor, height: int, width: int) -> Tensor:
        """Return an activation, or its gradient, as (N, C, H, W), without the tokens that belong to no place.

        Args:
            activation: It, in this layout.
            height: Height of the images that it is of, in pixels.
            width: Their width.

        Raises:
            ConfigError: If it has no places, or its tokens form no grid.
        """
        if not self.place_axes:
            raise ConfigError(self.unknown or "The activation has no height and width, so there is no place to point at.")
        moved = activation.movedim((self.channel_axis, *self.place_axes), tuple(range(1, 2 + len(self.place_axes))))
        if len(self.place_axes) == 2:
            return moved
        patches = moved[:, :, self.prefix :]
        number = patches.shape[2]
        rows = max(1, round(math.sqrt(number * height / width)))
        if number % rows:
            raise ConfigError(
                f"Expected the {number} tokens of an image of {height} x {width} pixels to form a grid of patches, which they "
                "do not. Look at another stage."
            )
        return patches.reshape(*patches.shape[:2], rows, number // rows)


class Probe(NamedTuple):
    """Shapes of one activation for images of three sizes.

    Attributes:
        side: Pixels of the smaller side.
        square: For one image, side x side.
        tall: For two images, twice as high.
        wide: For one image, twice as wide.
    """

    side: int
    square: Shape
    tall: Shape
    wide: Shape


def layout_from_probe(probe: Probe) -> ActivationLayout:
    """Tell the axes of an activation apart by how they grow with the images."""
    square, tall, wide = probe.square, probe.tall, probe.wide
    if len({len(square), len(tall), len(wide)}) > 1 or (square[0], tall[0], wide[0]) != (1, 2, 1):
        return _unknown(square, "its first axis is not the batch")
    down = [axis for axis in range(1, len(square)) if tall[axis] != square[axis]]
    across = [axis for axis in range(1, len(square)) if wide[axis] != square[axis]]
    rest = [axis for axis in range(1, len(square)) if axis not in (*down, *across)]
    if not down and not across:
        vector = _as_vector(square)
        return vector or _unknown(square, "none of its axes grows with the images")
    if len(rest) == len(down) == len(across) == 1:
        (channel,), (row,), (column,) = rest, down, across
        grown = tall[row] - square[row]
        if row != column:
            return ActivationLayout(square[channel], channel, (row, column), round(probe.side / grown))
        prefix = square[row] - grown  # one more square of patches was added
        if prefix >= 0 and grown > 0:
            return ActivationLayout(square[channel], channel, (row,), round(probe.side / math.sqrt(grown)), prefix)
    return _unknown(square, "its axes grow with the images in a way that is neither that of a map nor that of tokens")


def layout_from_shape(shape: Shape, size: int, network: nn.Module) -> ActivationLayout:
    """Tell the axes of an activation apart by its shape and what timm says of the network.

    Args:
        shape: Its shape for one square image.
        size: Side of the image in pixels.
        network: The network.
    """
    vector = _as_vector(shape)
    if shape[0] != 1:
        return _unknown(shape, "its first axis is not the batch")
    if vector:
        return vector
    if len(shape) == 4:
        first, last = shape[2] == shape[3], shape[1] == shape[2]
        if first and last:  # as many channels as rows and columns
            first, last = (getattr(network, "output_fmt", None) == fmt for fmt in ("NCHW", "NHWC"))
        if first != last:
            side = shape[2]
            return ActivationLayout(
                shape[1 if first else 3], 1 if first else 3, (2, 3) if first else (1, 2), round(size / side)
            )
    if len(shape) == 3 and (found := _tokens(shape, network)):
        axis, prefix = found
        return ActivationLayout(shape[3 - axis], 3 - axis, (axis,), round(size / math.isqrt(shape[axis] - prefix)), prefix)
    return _unknown(shape, "the network takes images of one size only, and its shape may be read in several ways")


def at_size(layout: ActivationLayout, shape: Shape, size: int) -> ActivationLayout:
    """Return the layout of an activation for images of one size, which may have a single value per channel where others do not.

    Args:
        layout: Its layout for images of any size.
        shape: Its shape for one image of this size.
        size: Side of the image in pixels.
    """
    vector = _as_vector(shape)
    return vector if vector and layout.stride and size >= 2 * layout.stride else layout


def _as_vector(shape: Shape) -> ActivationLayout | None:
    """Return the layout of what has one value per channel, such as (N, C) or a pooled (N, C, 1, 1)."""
    wide = [axis for axis in range(1, len(shape)) if shape[axis] > 1]
    if len(shape) > 1 and len(wide) <= 1:
        axis = wide[0] if wide else 1
        return ActivationLayout(shape[axis], axis)
    return None


def _tokens(shape: Shape, network: nn.Module) -> tuple[int, int] | None:
    """Return the axis of the tokens and how many stand before those of a square of patches; None in doubt."""
    described: Any = network
    grid: Sequence[int] = getattr(getattr(described, "patch_embed", None), "grid_size", None) or ()
    prefix = getattr(described, "num_prefix_tokens", None)
    if len(grid) == 2 and grid[0] == grid[1] and 0 <= shape[1] - math.prod(grid) <= (prefix or 0):
        return 1, shape[1] - math.prod(grid)
    if prefix is not None:
        return next(((1, each) for each in (prefix, 0) if _is_square(shape[1] - each)), None)
    found = [(axis, each) for axis in (1, 2) for each in (0, 1) if _is_square(shape[axis] - each)]
    return found[0] if len(found) == 1 else None


def _is_square(number: int) -> bool:
    return number > 1 and math.isqrt(number) ** 2 == number


def _unknown(shape: Shape, why: str) -> ActivationLayout:
    shown = " x ".join(map(str, shape))
    channels = shape[1] if len(shape) > 1 else shape[0] if shape else 1
    return ActivationLayout(
        channels, unknown=f"Its output of shape {shown} cannot be laid over the image: {why}. Look at another stage."
    )


def best_layout(candidates: Mapping[str, ActivationLayout]) -> str:
    """Return which of several activations shows a stage: the first with places, else the first that is understood."""
    spatial = [name for name, layout in candidates.items() if layout.spatial]
    known = [name for name, layout in candidates.items() if not layout.unknown]
    return (spatial or known or list(candidates))[0]
