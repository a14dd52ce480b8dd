"""How many bits the grey values of 16-bit files really have: cameras and scanners store 10, 12 or 14 bits in 16."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from finetune.images import FULL, largest_value

SAMPLE = 256
_BITS = (8, 10, 12, 14, 16)


class Depth(NamedTuple):
    """What a sample of 16-bit files holds.

    Attributes:
        number: How many of the sampled files have grey values of 16 bits.
        highest: The largest value in them.
    """

    number: int
    highest: int

    @property
    def bits(self) -> int:
        """The usual number of bits that holds the largest value."""
        return next(bits for bits in _BITS if self.highest < 2**bits)

    @property
    def white(self) -> int:
        """The value that is white in data of so many bits."""
        return 2**self.bits - 1 if self.highest else FULL


def sampled_depth(root: Path, files: Sequence[str]) -> Depth:
    """Look at up to `SAMPLE` files, evenly spread over a list; a function of the files alone.

    Args:
        root: The folder.
        files: Paths below it.
    """
    step = max(1, -(-len(files) // SAMPLE))
    found = [value for file in files[::step] if (value := largest_value(root / file)) is not None]
    return Depth(len(found), max(0, min(FULL, max(found, default=0))))


def depth_text(depth: Depth, scale: str) -> str:
    """Say how grey values of 16 bits are scaled, and what to type where that loses most of them; empty if there is nothing.

    >>> depth_text(Depth(40, 4000), "auto")
    'scale  16-bit grey is scaled as 12 bits: 4095 is white (the largest value of 40 sampled images is 4000)'
    >>> depth_text(Depth(0, 0), "full")
    ''
    """
    if not depth.number:
        return ""
    seen = f"the largest value of {depth.number} sampled images is {depth.highest}"
    if scale == "auto":
        return f"scale  16-bit grey is scaled as {depth.bits} bits: {depth.white} is white ({seen})"
    if depth.white == FULL:
        return ""
    levels = round(depth.highest * 255 / FULL) + 1
    return (
        f"warning: 16-bit grey is scaled by {FULL}, but {seen}: {levels} of 256 grey values are left. To scale it as "
        f"{depth.bits} bits, also when the model predicts: --data.scale auto"
    )
