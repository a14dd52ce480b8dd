"""What names and folders alone say of a folder of pictures, whatever is wrong with it: nothing is opened.

`scan` refuses a folder that it cannot read as classes and splits; a survey goes on and names everything.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from finetune.errors import DataError
from finetune.escaping import shown
from finetune.findings import Finding
from finetune.folders import NAMES, SPLITS, Split, split_folders
from finetune.images import UNREAD_SUFFIXES
from finetune.walk import UNREADABLE, Found, browse, identity, listing

FEW = 10  # pictures of a class to train on
UNBALANCED = 10  # times as many pictures in the largest class

_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst")
_SYSTEM = ("thumbs.db", "desktop.ini", "ehthumbs.db")
_LIKE_A_SPLIT = re.compile(
    r"[\W_\d]*(train|training|test|testing|val|valid|validation|dev|eval|holdout)[\W_\d]*"
    r"(set|data|dataset|split|images|imgs|pictures|photos)?[\W_\d]*",
    re.IGNORECASE,
)


class Member(NamedTuple):
    """A picture: its path below the root, its split, and the name of its class."""

    file: str
    split: Split
    label: str


@dataclass
class Survey:
    """What was found.

    Attributes:
        root: The folder.
        pictures: The pictures of all classes.
        findings: What is odd.
    """

    root: Path
    pictures: list[Member] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def note(self, kind: str, file: str, detail: str = "") -> None:
        """Add a finding."""
        self.findings.append(Finding(kind, file, detail))

    def counts(self, split: Split) -> Counter[str]:
        """Return the number of pictures of each class."""
        return Counter(member.label for member in self.pictures if member.split == split)


def survey(root: Path) -> Survey:
    """Look at the names of all that is below a folder.

    Args:
        root: A folder that exists.
    """
    found = Survey(root)
    splits = _splits(found)
    above = {identity(str(root)), *(identity(str(root / name)) for name in splits.values() if name)}
    classes: dict[Split, list[str]] = {}
    for split, name in splits.items():
        classes[split] = list(_classes(found, name, split, above))
    if splits and "" not in splits.values():
        _beside_splits(found, set(splits.values()))
    _judge_classes(found, classes)
    return found


def _splits(found: Survey) -> dict[Split, str]:
    """Return the folder of each split; where the layout is none, what comes nearest to one."""
    try:
        return split_folders(found.root, Counter())
    except DataError as error:
        found.note("layout", "", str(error))
    names = [entry.path for entry in _level(found, "") if entry.kind == "folder"]
    known = {name: NAMES[name.lower()] for name in names if name.lower() in NAMES}
    return {split: name for name, split in known.items()} if "train" in known.values() else {"train": ""}


def _classes(found: Survey, top: str, split: Split, above: set[tuple[int, int]]) -> Iterator[str]:
    """Yield the folders of the classes of a split and note all that lies in them."""
    for entry in _level(found, top):
        path = f"{top}/{entry.path}" if top else entry.path
        if entry.kind != "folder":
            _judge_file(found, path, entry, "picture outside")
            continue
        _judge_name(found, path)
        if _LIKE_A_SPLIT.fullmatch(entry.path) and entry.path.lower() not in NAMES:
            found.note("split-name", path, "read as a class; a split is called train, val or test")
        label = unicodedata.normalize("NFC", entry.path)
        _class(found, path, Member(path, split, label), above)
        yield entry.path


def _class(found: Survey, path: str, member: Member, above: set[tuple[int, int]]) -> None:
    """Note all that lies in the folder of a class."""
    depths: Counter[bool] = Counter()
    inside: dict[str, list[str]] = defaultdict(list)
    for entry in browse(str(found.root / path), above):
        whole = f"{path}/{entry.path}" if entry.path else path
        _judge_file(found, whole, entry)
        inside[os.path.dirname(whole)].append(os.path.basename(whole))
        if entry.path:
            _judge_name(found, whole)
        if entry.kind == "picture":
            found.pictures.append(member._replace(file=whole))
            depths["/" in entry.path] += 1
    if len(depths) > 1:
        found.note("mixed-nesting", path, f"{depths[False]} pictures in the folder, {depths[True]} below it")
    for folder, names in inside.items():
        _judge_clashes(found, folder, names)


def _level(found: Survey, top: str) -> Iterator[Found]:
    """Yield what lies in one folder, not what lies below."""
    try:
        yield from listing(str(found.root / top))
    except OSError as error:
        found.note("unreadable-folder", top, error.strerror or "")


def _beside_splits(found: Survey, splits: set[str]) -> None:
    for entry in _level(found, ""):
        if entry.kind != "folder":
            _judge_file(found, entry.path, entry, "picture outside")
        elif entry.path not in splits:
            kind = "split-name" if _LIKE_A_SPLIT.fullmatch(entry.path) else "ignored-folder"
            found.note(kind, entry.path, f"not read, as {', '.join(sorted(splits))} are the splits")


# ------------------------------------------------------------------------------------------------------ files and names

_KINDS = {
    "picture outside": "outside-a-class",
    "hidden": "hidden",
    "broken link": "broken-link",
    "special file": "special-file",
    UNREADABLE: "unreadable-folder",
}


def _judge_file(found: Survey, path: str, entry: Found, picture: str = "picture") -> None:
    """Note what a file is that is no picture of a class."""
    kind = picture if entry.kind == "picture" else entry.kind
    if kind in ("picture", "folder"):
        return
    if kind == "folder again":
        here, there = os.path.realpath(found.root / path), os.path.realpath((found.root / path).parent)
        above = there == here or there.startswith(f"{here}{os.sep}")
        found.note("link-loop" if above else "linked-again", path, f"leads to {os.path.relpath(here, found.root)}")
    elif kind in _KINDS:
        found.note(_KINDS[kind], path, entry.reason)
    else:
        found.note(*_other_file(found.root / path, path))


def _other_file(whole: Path, path: str) -> tuple[str, str, str]:
    name, ending = path.rpartition("/")[2].lower(), os.path.splitext(path)[1].lower()
    if whole.is_symlink() and not whole.exists():
        return "broken-link", path, ""
    if name in _SYSTEM:
        return "hidden", path, ""
    if ending in _ARCHIVES:
        return "archive", path, "unpack it"
    if ending in UNREAD_SUFFIXES:
        return "unread-format", path, f"convert {ending} to JPEG or PNG"
    if not ending and _starts_like_a_picture(whole):
        return "unread-format", path, "a picture without an ending: rename it"
    return "other-file", path, ""


def _starts_like_a_picture(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(12).startswith((b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8"))
    except OSError:
        return False


def _judge_name(found: Survey, path: str) -> None:
    """Note what is odd in the last part of a path."""
    name = path.rpartition("/")[2]
    if name.replace("_", "").replace("-", "").replace(".", "").isalnum() and name.isascii() and name[0] not in "-.":
        return
    categories = {unicodedata.category(letter) for letter in name}
    if "Cs" in categories:
        found.note("undecodable-name", path)
    if any(shown(letter) != letter for letter in name if unicodedata.category(letter) != "Cs"):
        found.note("control-characters", path)
    if name[0] in "=+-@" or re.search(r"[<>]", name):
        found.note("risky-name", path)
    if name != name.strip() or "So" in categories or re.search(r"[`$;&|*?\"'\\!]", name):
        found.note("unusual-name", path)
    elif " " in name:
        found.note("space-in-name", path)


def _judge_clashes(found: Survey, folder: str, names: Iterable[str]) -> None:
    for group in _alike(names, str.casefold):
        found.note("case-clash", f"{folder}/{group[0]}", f"and {', '.join(group[1:])}")


def _alike(names: Iterable[str], key: Callable[[str], str]) -> Iterator[list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(names):
        groups[key(name)].append(name)
    return (sorted(group) for group in groups.values() if len(group) > 1)


# -------------------------------------------------------------------------------------------------------------- classes


def _judge_classes(found: Survey, classes: dict[Split, list[str]]) -> None:
    for group in _alike([name for names in classes.values() for name in names], _plain_name):
        same = len({unicodedata.normalize("NFC", name) for name in group}) == 1
        found.note("similar-names", group[0], f"and {', '.join(group[1:])}: {'one class' if same else 'several classes'}")
    train = found.counts("train")
    largest = max(train.values(), default=0)
    for label in sorted({unicodedata.normalize("NFC", name) for name in classes.get("train", [])}):
        number = train[label]
        if not number:
            found.note("empty-class", label)
        elif number < FEW:
            found.note("few-pictures", label, f"{number} pictures")
        if 0 < number * UNBALANCED < largest:
            found.note("imbalance", label, f"{number} pictures, the largest class has {largest}")
    for split in SPLITS[1:]:
        there = found.counts(split)
        for label in sorted(set(train) - set(there)) if split in classes else ():
            found.note("missing-class", label, f"not in {split}")
        for label in sorted(set(there) - set(train)):
            found.note("unknown-class", label, f"{there[label]} pictures of {split}")


def _plain_name(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()
