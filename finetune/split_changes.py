"""What became of a run's images since it was started, and how each is used now: no image is both trained on and measured.

The rules, where a table of the run is known; images are told apart by path and by content:

* An image that is as it was keeps its role. One that was moved or renamed keeps the role of its content.
* Content that was trained on is never measured, content that was held out is never trained on, wherever a copy of it lies.
* A path whose content is new keeps its role.
* A new image goes where its folder says (train/, val/, test/). Where the split is drawn it is trained on, so that validation
  stays the same set and its metrics compare; where data.shots or data.fraction bound the number, it is not used.
* One more copy of known content is not used.
* Where an older table knows no content and files are missing, a new one may be a held-out one under another name: not used.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

from finetune.escaping import shown
from finetune.folders import SPLITS, Split
from finetune.split_table import Role, Row, SplitTable
from finetune.walk import order

Kind = Literal["added", "removed", "renamed", "moved", "relabelled", "changed", "copied", "crossed"]
_TEXTS: dict[Kind, str] = {
    "added": "added",
    "removed": "removed",
    "renamed": "renamed",
    "moved": "moved to another folder",
    "relabelled": "moved to another class",
    "changed": "with other content",
    "copied": "copied, of which copies are not used",
    "crossed": "in a split that their content does not belong to, and not used there",
}
_NAMED = 3


class Image(NamedTuple):
    """An image as it is now.

    Attributes:
        file: Path below the root.
        label: Name of its class.
        split: What it would be in a run that starts now; None if it would not be used.
        given: Whether its folder says so, as opposed to a draw.
        size: Bytes.
        digest: Hash of its content; empty if not known.
    """

    file: str
    label: str
    split: Split | None
    given: bool
    size: int = 0
    digest: str = ""

    def row(self, role: Role, epoch: int) -> Row:
        """Return the row of the image in a table."""
        return Row(self.file, self.label, role, self.size, self.digest, epoch)


class Change(NamedTuple):
    """A difference between a table and what is there.

    Attributes:
        kind: What happened.
        file: The image; one that is gone by the name that it had.
        detail: Where it came from, which class it had.
    """

    kind: Kind
    file: str
    detail: str = ""


@dataclass(frozen=True)
class Reconciled:
    """How images are used now.

    Attributes:
        roles: The role of each image that is there.
        changes: What differs from the table.
        rows: What a resumed run adds to the table.
    """

    roles: dict[str, Role]
    changes: list[Change] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


def first_table(images: Iterable[Image]) -> SplitTable:
    """Return the table of a run that starts now."""
    return SplitTable(tuple(sorted((i.row(i.split or "unused", 0) for i in images), key=_place)))


def _place(row: Row) -> tuple[int, str, str]:
    places = [*SPLITS, "unused"]
    return places.index(row.role), row.label, order(row.file)


def reconcile(
    table: SplitTable,
    images: Sequence[Image],
    epoch: int = 0,
    bounded: bool = False,
    another: bool = False,
    unusable: Collection[str] = (),
) -> Reconciled:
    """Compare images with the table of a run and say how each is used, see the head of the module.

    Args:
        table: The table.
        images: What is there now, in any order.
        epoch: Epochs that are done, for the rows.
        bounded: Whether the number of training images is bounded, so that new ones are not used.
        another: Whether this is another folder than the run's: then paths mean nothing, and new images are as drawn.
        unusable: Files that are there but cannot be read; they count neither as removed nor as changed.
    """
    return _Comparison(table, images, epoch, bounded, another, unusable).result()


def is_another(table: SplitTable, images: Sequence[Image]) -> bool:
    """Return whether fewer than half of some images are in a table: by content where that is known, otherwise by path."""
    digests = {row.digest for row in table.rows if row.digest}
    blind = {order(row.file) for row in table.rows if not row.digest}
    known = sum(image.digest in digests or order(image.file) in blind for image in images)
    return 2 * known < len(images)


class _Comparison:
    def __init__(
        self,
        table: SplitTable,
        images: Sequence[Image],
        epoch: int,
        bounded: bool,
        another: bool,
        unusable: Collection[str],
    ) -> None:
        self.epoch, self.bounded, self.another = epoch, bounded, another
        self.images = sorted(images, key=lambda image: order(image.file))
        self.last = {order(row.file): row for row in table.rows}
        self.here = {order(image.file): image for image in images} | dict.fromkeys(map(order, unusable))
        self.trained = {row.digest for row in table.rows if row.role == "train" and row.digest}
        self.held: dict[str, Role] = {}
        for row in table.rows:
            if row.role in ("val", "test") and row.digest and row.digest not in self.trained:
                self.held.setdefault(row.digest, row.role)
        self.known = {row.digest for row in table.rows if row.digest}
        blind = not any(row.digest for row in table.rows)
        self.silent = bounded and blind  # an older table leaves out what is not used
        self.unsure = blind and any(path not in self.here for path in self.last)  # a new file may be a held-out one, renamed
        self.roles: dict[str, Role] = {}
        self.changes: list[Change] = []
        self.taken: dict[str, Role] = {}  # content, and how it is used now
        self.sources: dict[str, list[Row]] = defaultdict(list)  # content, and the paths at which it no longer lies
        self.paired: set[str] = set()

    def result(self) -> Reconciled:
        rest = [image for image in self.images if not self._as_it_was(image)]
        for path, row in self.last.items():
            image = self.here.get(path)
            gone = path not in self.here or (image is not None and image.file not in self.roles)
            if row.role != "removed" and row.digest and gone:
                self.sources[row.digest].append(row)
        rest.sort(key=lambda image: (self._label_of(image.digest) != image.label, order(image.file)))
        for image in rest:
            self._place(image)
        if not self.another:
            for path, row in self.last.items():
                if path not in self.here and row.role != "removed" and path not in self.paired:
                    self.changes.append(Change("removed", row.file))
        self.changes.sort(key=lambda change: (list(_TEXTS).index(change.kind), order(change.file)))
        return Reconciled(self.roles, self.changes, self._rows())

    def _as_it_was(self, image: Image) -> bool:
        row = self.last.get(order(image.file))
        if row is None or row.role == "removed" or (self.another and not row.digest):
            return False
        if row.digest and image.digest and row.digest != image.digest:
            return False
        self._use(image, row.role)
        if row.label != image.label:
            self.changes.append(Change("relabelled", image.file, f"{row.label} → {image.label}"))
        return True

    def _use(self, image: Image, role: Role) -> None:
        self.roles[image.file] = role
        if image.digest:
            self.taken.setdefault(image.digest, role)

    def _label_of(self, digest: str) -> str | None:
        found = self.sources.get(digest)
        return found[0].label if found else None

    def _place(self, image: Image) -> None:
        if image.digest in self.known:
            self._place_known(image)
            return
        role, row = self._role_of_new(image), None if self.another else self.last.get(order(image.file))
        at_hand = self.taken.get(image.digest, role)  # the same new content may have come twice, into two splits
        if at_hand != role:
            self._use(image, "unused")
            self.changes.append(Change("crossed", image.file, f"also {at_hand}"))
            return
        self._use(image, role)
        if row is not None and row.role != "removed":
            self.changes.append(Change("changed", image.file))
        elif not (self.silent and role == "unused"):
            self.changes.append(Change("added", image.file, role))

    def _role_of_new(self, image: Image) -> Role:
        row = None if self.another else self.last.get(order(image.file))
        if image.given and image.split is not None and not (image.split == "train" and self.bounded):
            return image.split
        if row is not None and row.role != "removed":
            return row.role
        if self.another:
            return image.split or "unused"
        return "unused" if self.bounded or self.unsure else "train"

    def _place_known(self, image: Image) -> None:
        digest, measured = image.digest, image.given and image.split in ("val", "test")
        role: Role = "train" if digest in self.trained else self.held.get(digest, "unused")
        crosses = image.given and image.split != role and role != "unused"
        if role == "unused" and measured:
            role = image.split or role
        elif role == "train" and measured:
            role = "unused"
        source = next((row for row in self.sources[digest] if order(row.file) not in self.paired), None)
        if digest in self.taken:
            role = "unused"
        self._use(image, role)
        if source is not None:
            self.paired.add(order(source.file))
        self.changes.append(self._what_happened(image, source, crosses and role == "unused"))

    def _what_happened(self, image: Image, source: Row | None, crosses: bool) -> Change:
        before = "" if source is None else source.file
        if crosses:
            return Change("crossed", image.file, f"it was {before}" if before else "a copy")
        if source is None:
            came_back = self.taken[image.digest] == self.roles[image.file] != "unused"
            return Change("added" if came_back else "copied", image.file)
        if source.label != image.label:
            return Change("relabelled", image.file, f"{source.label} → {image.label}")
        same = PurePosixPath(before).parent == PurePosixPath(image.file).parent
        return Change("renamed" if same else "moved", image.file, f"it was {before}")

    def _rows(self) -> list[Row]:
        rows = []
        for image in self.images:
            row, role = self.last.get(order(image.file)), self.roles[image.file]
            if row is None or (row.label, row.role) != (image.label, role) or row.digest != image.digest != "":
                rows.append(image.row(role, self.epoch))
        if self.another:
            return rows
        gone = [row for path, row in self.last.items() if path not in self.here and row.role != "removed"]
        return rows + [row._replace(role="removed", epoch=self.epoch) for row in gone]


def describe(changes: Sequence[Change]) -> str:
    """Return what differs in one message: counts, and up to three names of each kind; empty if nothing does.

    >>> describe([Change("removed", "cat/1.jpg"), Change("renamed", "cat/3.jpg", "it was cat/2.jpg")])
    '1 removed (cat/1.jpg); 1 renamed (cat/3.jpg: it was cat/2.jpg)'
    """
    kinds: dict[Kind, list[Change]] = defaultdict(list)
    for change in changes:
        kinds[change.kind].append(change)
    parts = []
    for kind, text in _TEXTS.items():
        if found := kinds.get(kind):
            say: Callable[[Sequence[Change]], str] = _classes if kind == "relabelled" else _files
            parts.append(f"{len(found)} {text} ({say(found)})")
    return "; ".join(parts)


def _files(changes: Sequence[Change]) -> str:
    named = [shown(f"{c.file}: {c.detail}" if c.detail and c.kind != "added" else c.file) for c in changes[:_NAMED]]
    return ", ".join(named) + (f" and {len(changes) - _NAMED} more" if len(changes) > _NAMED else "")


def _classes(changes: Sequence[Change]) -> str:
    """Count the pairs of classes, which tells of whole folders that were swapped or renamed."""
    pairs = Counter(change.detail for change in changes)
    named = [f"{number} {shown(pair)}" for pair, number in pairs.most_common(2 * _NAMED)]
    return ", ".join(named) + (" and others" if len(pairs) > 2 * _NAMED else "") + f": {_files_only(changes)}"


def _files_only(changes: Sequence[Change]) -> str:
    more = f" and {len(changes) - _NAMED} more" if len(changes) > _NAMED else ""
    return ", ".join(shown(change.file) for change in changes[:_NAMED]) + more
