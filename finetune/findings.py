"""What can be wrong with a folder of pictures: the kinds, what was found of each, and how that is told."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from tabulate import tabulate

from finetune.escaping import cells, shown

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""error: training stops at it. warning: pictures are left out, or the result may be wrong. note: good to know."""


class Kind(NamedTuple):
    """A kind of damage or oddity: how bad it is, what it is, and what training does about it."""

    severity: Severity
    text: str


def _kinds(severity: Severity, **texts: str) -> dict[str, Kind]:
    return {name.replace("_", "-"): Kind(severity, text) for name, text in texts.items()}


KINDS: Mapping[str, Kind] = MappingProxyType(
    _kinds(
        "error",
        layout="the folder cannot be read as classes and splits",
        unreadable_folder="a folder that may not be read, or cannot be",
        unreadable_file="a file that may not be read, or cannot be",
        empty_file="0 bytes",
        not_a_picture="named like a picture, and is none",
        truncated="cut off: the end of the file is missing",
        damaged="the file is whole but cannot be decoded",
        too_many_pixels="more pixels than the limit against decompression bombs",
        empty_class="a class without a picture to train on",
        unknown_class="a class of validation or test that training does not have",
    )
    | _kinds(
        "warning",
        two_labels="the same picture in several classes",
        in_two_splits="the same picture in several splits: results look better than they are",
        duplicate="the same picture again, in the same class",
        few_pictures="a class with fewer than 10 pictures to train on",
        imbalance="a class with less than a tenth of the pictures of the largest",
        missing_class="a class of training that validation or test does not have",
        similar_names="class names that differ in case, spaces or Unicode form only",
        split_name="looks like a split, and is read as a class, or not at all",
        ignored_folder="beside the splits, and not one of them: not read",
        outside_a_class="a picture that lies in no class folder: not read",
        unread_format="a picture in a format that is not read, or without a known ending",
        archive="an archive: not unpacked, not read",
        broken_link="a link to nothing, or to itself",
        link_loop="a link to a folder above it: not followed",
        tiny="a side of fewer than 8 pixels",
        huge="a side of 10,000 pixels or more: slow to read",
        one_colour="every pixel is the same",
        control_characters="a name with line ends or codes that steer a terminal",
        risky_name="a name that a spreadsheet takes for a formula, or a web page for markup",
        undecodable_name="a name whose bytes are no letters",
        case_clash="names in one folder that differ in case only: other systems keep one of them",
    )
    | _kinds(
        "note",
        wrong_ending="the ending says another format than the content, which decides",
        several_frames="an animation or several pages: the first is read",
        elongated="more than 4 times as long as wide: the ends are cut off",
        deep_colour="16 bits or floating point: scaled to 8 bits",
        cmyk="colours for print (CMYK): converted to RGB",
        transparent="transparent pixels: laid on white",
        linked_again="a link to a folder that is read already: not followed",
        mixed_nesting="a class with pictures both in its folder and in folders below",
        hidden="a hidden or system file: not read",
        other_file="not a picture: not read",
        special_file="a pipe, socket or device: not read",
        unusual_name="a name with emoji, spaces at its ends, or letters that have a meaning in a shell",
        space_in_name="a name with a space",
    )
)
"""All kinds, the worst first."""


class Finding(NamedTuple):
    """Something that was found.

    Attributes:
        kind: One of `KINDS`.
        file: Path below the folder; empty for the folder itself.
        detail: What exactly.
    """

    kind: str
    file: str
    detail: str = ""

    @property
    def severity(self) -> Severity:
        """How bad it is."""
        return KINDS[self.kind].severity


class Findings(list[Finding]):
    """What was found in a folder."""

    def counts(self) -> dict[str, int]:
        """Return the number of findings of each kind there is, the worst first."""
        found = Counter(finding.kind for finding in self)
        return {kind: found[kind] for kind in KINDS if found[kind]}

    def number(self, severity: Severity) -> int:
        """Return the number of findings that are as bad."""
        return sum(finding.severity == severity for finding in self)

    def table(self, examples: int = 2) -> str:
        """Return a table of the kinds with their numbers and first examples."""
        first: dict[str, list[Finding]] = {}
        for finding in self:
            some = first.setdefault(finding.kind, [])
            if len(some) < examples:
                some.append(finding)
        rows = []
        for kind, number in self.counts().items():
            more = ["…"] if number > examples else []
            named = "\n".join([*(_example(finding) for finding in first[kind]), *more])
            rows.append([KINDS[kind].severity, kind, number, KINDS[kind].text, named])
        heads = ["", "kind", "number", "what it is", "such as"]
        sides = ("left", "left", "right", "left", "left")
        return tabulate(rows, heads, disable_numparse=True, maxcolwidths=[None, None, None, 44, 60], colalign=sides)

    def as_csv(self) -> bytes:
        """Return a row for each: kind, severity, file, detail."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["kind", "severity", "file", "detail"])
        writer.writerows([each.kind, each.severity, *cells([each.file, each.detail])] for each in self)
        return text.getvalue().encode("utf-8", "surrogateescape")

    def as_json(self, facts: Mapping[str, Any]) -> bytes:
        """Return an object with some facts, the counts, and a list of all."""
        each = [{"kind": f.kind, "severity": f.severity, "file": f.file, "detail": f.detail} for f in self]
        return (json.dumps({**facts, "counts": self.counts(), "findings": each}, indent=1) + "\n").encode()


def _example(finding: Finding) -> str:
    name = shown(finding.file) or "."
    detail = f" ({shown(finding.detail)})" if finding.detail else ""
    return f"{name if len(name) <= 60 else f'{name[:20]}…{name[-38:]}'}{detail}"


def told_briefly(counts: Mapping[str, int]) -> str:
    """Name kinds and numbers in a line.

    >>> told_briefly({"truncated": 2, "archive": 1})
    'truncated 2, archive 1'
    """
    return ", ".join(f"{kind} {number}" for kind, number in counts.items())


def sorted_findings(found: Iterable[Finding]) -> Findings:
    """Return findings in the order of their kinds, and of files within one."""
    place = {kind: number for number, kind in enumerate(KINDS)}
    return Findings(sorted(found, key=lambda finding: (place[finding.kind], finding.file, finding.detail)))
