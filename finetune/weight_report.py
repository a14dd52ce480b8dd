"""What was used of a source of weights, for the console and for the checkpoint."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Report:
    """What was used of a source of weights. Names are those of the backbone where it has the tensor, otherwise of the source.

    Attributes:
        source: hub, bundled, package, file, checkpoint or none.
        location: The path, or the repository or address that the hub's file came from.
        sha256: Of the file.
        kept: Number of the backbone's tensors that were filled, counters of BatchNorm aside.
        dropped: Tensors of the source that were not used, among them those of another shape.
        missing: Tensors of the backbone that were not filled, among them those of another shape: they stay random.
        reshaped: Tensors that were used after a change of shape.
        head: `new` or `from the weights`.
        untrained: The stages with a missing tensor: freezing one of them would freeze random values.
        input: The input that the weights expect, as plain values, if their file says so.
        note: What the weights are, in a few words, if that is known.
    """

    source: str
    location: str | None
    sha256: str | None
    kept: int
    dropped: tuple[str, ...]
    missing: tuple[str, ...]
    reshaped: tuple[str, ...]
    head: str
    untrained: tuple[str, ...]
    input: dict[str, Any] | None = None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, fit for a checkpoint."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Report:
        """Restore what `as_dict` returned, also of a later version, which may say more."""
        known = {field.name for field in dataclasses.fields(cls)} & fields.keys()
        values: dict[str, Any] = {n: tuple(fields[n]) if isinstance(fields[n], list) else fields[n] for n in known}
        return cls(**values)

    def summary(self) -> str:
        """Return a text of a few lines for the console."""
        if self.source == "none":
            return "weights: none, the whole network starts from random values"
        total = self.kept + len(self.missing)
        lines = [
            f"weights: {self.source} {self.location} (sha256 {(self.sha256 or '')[:12]})",
            *([f"  {self.note}"] if self.note else []),
            f"  kept {self.kept} of {total} tensors of the backbone; the head is {self.head}",
        ]
        if self.missing:
            lines += [
                f"  missing {len(self.missing)}: {grouped(self.missing)}",
                f"    they start from random values, so {', '.join(self.untrained)} should train and not be frozen",
            ]
        if self.dropped:
            lines.append(f"  dropped {len(self.dropped)}: {grouped(self.dropped)} (in the source, but not used)")
        if self.reshaped:
            lines.append(f"  reshaped {len(self.reshaped)}: {grouped(self.reshaped)}")
        return "\n".join(lines)


def grouped(names: Iterable[str]) -> str:
    """List names; many of them by what they begin with.

    >>> grouped([f"layer4.0.conv{i}.weight" for i in range(7)] + ["blocks.6.0.conv.bias", "fc.bias"])
    'layer4 (7), blocks.6 (1), fc (1)'
    """
    names = list(names)
    if len(names) <= 6:
        return ", ".join(names)
    starts = [re.match(r"[^.]*[^.\d]\.\d+(?=\.)|[^.]+", name) for name in names]
    groups = Counter(start[0] if start else "" for start in starts)
    listed = [f"{name} ({number})" for name, number in list(groups.items())[:10]]
    return ", ".join(listed) + (f" and {len(groups) - 10} more groups" if len(groups) > 10 else "")
