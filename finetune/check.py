"""The verb `check`: a folder of pictures -> everything that is wrong with it, in a table and a file."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from finetune.console import say
from finetune.errors import ConfigError, DataError
from finetune.escaping import shown
from finetune.examined import examine_all
from finetune.files import require_free, write_atomically
from finetune.findings import SEVERITIES, Finding, Findings, sorted_findings
from finetune.folders import scan
from finetune.survey import Member, Survey, survey
from finetune.walk import existing

_EXPLAINED = {"unreadable-folder", "empty-class", "unknown-class", "layout"}  # errors of the layout that are named one by one


class Checked(NamedTuple):
    """What a check came to.

    Attributes:
        root: The folder.
        pictures: Number of its pictures.
        findings: What is wrong or odd.
    """

    root: Path
    pictures: int
    findings: Findings

    def failed(self, strict: bool) -> bool:
        """Say whether there is an error, or, if strict, a warning."""
        return bool(self.findings.number("error") or (strict and self.findings.number("warning")))


def check(root: str | os.PathLike[str], quick: bool = False, workers: int | None = None) -> Checked:
    """Look for all that is wrong with a folder of pictures.

    Args:
        root: The folder.
        quick: Read only headers and ends of files: finds neither damage in the middle of a file nor equal pictures.
        workers: Processes that read pictures; from the cores if None.

    Raises:
        DataError: If there is no such folder.
    """
    folder = existing(Path(root).expanduser())
    names = survey(folder)
    found = [*names.findings, *_refused(names)]
    equal: dict[bytes, list[Member]] = defaultdict(list)
    members = {member.file: member for member in names.pictures}
    for file, look in examine_all(folder, list(members), not quick, workers):
        found += [Finding(look.error, file, look.detail)] * bool(look.error)
        found += [Finding(kind, file, detail) for kind, detail in look.notes]
        if look.digest:
            equal[look.digest].append(members[file])
    for group in equal.values():
        found += _equal(group)
    return Checked(folder, len(members), sorted_findings(found))


def _refused(names: Survey) -> Iterator[Finding]:
    """Yield why `scan` refuses the folder, where the survey has not named it."""
    if _EXPLAINED.isdisjoint(finding.kind for finding in names.findings):
        try:
            scan(names.root)
        except DataError as error:
            yield Finding("layout", "", str(error))


def _equal(group: list[Member]) -> Iterator[Finding]:
    """Yield what is wrong with pictures of which all pixels are equal."""
    first = group[0]
    several_labels, several_splits = len({m.label for m in group}) > 1, len({m.split for m in group}) > 1
    for member in group:
        if several_labels:
            other = next(m for m in group if m.label != member.label)
            yield Finding("two-labels", member.file, f"equal to {other.file}")
        if several_splits:
            other = next(m for m in group if m.split != member.split)
            yield Finding("in-two-splits", member.file, f"equal to {other.file}")
        same = (member.split, member.label) == (first.split, first.label)
        if same and member is not first:
            yield Finding("duplicate", member.file, f"equal to {first.file}")


def check_to_terminal(
    root: str,
    out: str | None = None,
    quick: bool = False,
    strict: bool = False,
    workers: int | None = None,
    overwrite: bool = False,
) -> int:
    """Do what `resnet-finetune check` does; return its exit code.

    Args:
        root: The folder.
        out: Where to write all findings, .json or .csv.
        quick: See `check`.
        strict: Let warnings count as errors.
        workers: See `check`.
        overwrite: Replace the file if it exists.

    Raises:
        DataError: If there is no such folder.
        ConfigError: If the file exists, or cannot be written.
    """
    target = None if out is None else Path(out)
    if target is not None:
        if target.suffix not in (".json", ".csv"):
            raise ConfigError(f"Expected --out to end in .json or .csv, found {out}.")
        require_free(target, overwrite)
    checked = check(root, quick, workers)
    findings = checked.findings
    if findings:
        say(findings.table())
    numbers = ", ".join(f"{number} {each}{'s' * (number != 1)}" for each in SEVERITIES for number in [findings.number(each)])
    say(f"{shown(str(checked.root))}: {checked.pictures} pictures, {numbers}" + (" (a quick look)" if quick else ""))
    if target is not None:
        _write(checked, target)
        say(f"all of them: {target}")
    return int(checked.failed(strict))


def _write(checked: Checked, target: Path) -> None:
    facts = {"folder": str(checked.root.absolute()), "pictures": checked.pictures}
    content = checked.findings.as_csv() if target.suffix == ".csv" else checked.findings.as_json(facts)
    try:
        write_atomically(target, content)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror or error}. Give another --out.") from error
