"""Images that change between the start of a run and its resume: no content is both trained on and measured, all is named."""

import random

import pytest

from finetune.split_changes import Change, Image, describe, first_table, is_another, reconcile

CLASSES = ("ant", "bee")


class Folder:
    """A folder in memory: path -> content. Splits are folders, or drawn by the parity of a number in the content."""

    def __init__(self, given, seed, number=24):
        self.given, self.random = given, random.Random(seed)
        self.files = {}
        self.next = 0
        for _ in range(number):
            self.files[self.new_path()] = self.new_content()

    def new_content(self):
        self.next += 1
        return f"{self.next:04d}"

    def new_path(self):
        split = self.random.choice(["train", "train", "val", "test"]) + "/" if self.given else ""
        return f"{split}{self.random.choice(CLASSES)}/{self.random.randrange(10**6):06d}.png"

    def images(self):
        found = []
        for path, content in self.files.items():
            *split, label, _ = path.split("/")
            drawn = "val" if int(content) % 4 == 0 else "train"
            found.append(Image(path, label, split[0] if split else drawn, bool(split), 10, content))
        self.random.shuffle(found)
        return found

    def edit(self):
        path = self.random.choice(sorted(self.files))
        other = self.random.choice(sorted(self.files))
        folder, _, name = path.rpartition("/")
        match self.random.randrange(10):
            case 0 | 1 if len(self.files) > 3:
                del self.files[path]
            case 2:
                self.files[self.new_path()] = self.new_content()
            case 3:
                self.files[f"{folder}/renamed {name}"] = self.files.pop(path)
            case 4:
                self.files[self.new_path()] = self.files.pop(path)
            case 5:
                self.files[self.new_path()] = self.files[path]
            case 6:
                self.files[path] = self.new_content()
            case 7:
                self.files[path], self.files[other] = self.files[other], self.files[path]
            case 8:  # two class folders are swapped
                swap = {"ant": "bee", "bee": "ant"}
                turned = {"/".join(swap.get(part, part) for part in p.split("/")): c for p, c in self.files.items()}
                self.files = turned
            case _:
                self.files[path] = self.files[other]


@pytest.mark.parametrize("given", [True, False])
def test_after_500_edits_nothing_is_both_trained_on_and_measured_and_all_is_named(given):
    edits = 0
    for seed in range(50):
        folder = Folder(given, seed)
        table = first_table(folder.images())
        trained = {row.digest for row in table.rows if row.role == "train"}
        held = {row.digest for row in table.rows if row.role in ("val", "test")}
        assert not trained & held
        for session in range(1, 5):
            before = dict(folder.files)
            for _ in range(folder.random.randrange(6) if session > 1 else 5):
                folder.edit()
                edits += 1
            images = folder.images()
            found = reconcile(table, images, session, bounded=seed % 5 == 0)
            assert set(found.roles) == set(folder.files)
            now = {folder.files[file]: role for file, role in found.roles.items() if role != "unused"}
            for content, role in now.items():
                assert role != "train" or content not in held
                assert role not in ("val", "test") or content not in trained
            assert all(
                found.roles[file] == now[content]
                for file, content in folder.files.items()
                if content in now and found.roles[file] != "unused"
            )
            _require_named(before, folder.files, found.changes)
            if folder.random.random() < 0.3:  # only measured: nothing is written down, and the next look says it again
                folder.files = before
                continue
            table = table.with_rows(found.rows)
            trained |= {content for content, role in now.items() if role == "train"}
            held |= {content for content, role in now.items() if role in ("val", "test")}
            again = reconcile(table, folder.images(), session)
            assert (again.roles, again.changes, again.rows) == (found.roles, [], [])
    assert edits >= 500


def _require_named(before, after, changes):
    named = {change.file for change in changes}
    came_from = {change.detail.removeprefix("it was ") for change in changes}
    assert {path for path, content in after.items() if before.get(path) != content} == named & set(after)
    gone = set(before) - set(after)
    relabelled = {before_path for before_path in gone if any(c.kind in ("relabelled", "crossed") for c in changes)}
    assert gone <= named | came_from | relabelled
    if before == after:
        assert changes == []
        assert describe(changes) == ""
    else:
        assert describe(changes)


def images(**splits):
    """Return images whose name is `label/content`, with a drawn split."""
    return [Image(f"{n[0]}/{n}.png", n[0], split, False, 1, n) for split, names in splits.items() for n in names.split()]


TRAIN, VAL = "a1 a2 a3 a4 b1 b2 b3 b4", "a5 a6 b5 b6"


def changed(*, drop="", more=()):
    return [*(i for i in images(train=TRAIN, val=VAL) if i.digest not in drop.split()), *more]


TABLE = first_table(images(train=TRAIN, val=VAL))


def test_what_is_held_out_stays_so_when_some_of_it_is_deleted():
    found = reconcile(TABLE, changed(drop="a5 b5 b6"))
    assert [file for file, role in found.roles.items() if role == "val"] == ["a/a6.png"]
    assert describe(found.changes) == "3 removed (a/a5.png, b/b5.png, b/b6.png)"


def test_swapped_classes_keep_their_splits_and_are_named():
    turned = [i._replace(label="ba"["ab".index(i.label)], file=f"{'ba'['ab'.index(i.label)]}{i.file[1:]}") for i in changed()]
    found = reconcile(TABLE, turned)
    assert {i.digest for i in turned if found.roles[i.file] == "val"} == set(VAL.split())
    assert describe(found.changes) == ("12 moved to another class (6 b → a, 6 a → b: a/b1.png, a/b2.png, a/b3.png and 9 more)")


@pytest.mark.parametrize(
    ("content", "folder", "role"), [("a1", "val", "unused"), ("a5", "train", "unused"), ("a9", "val", "val")]
)
def test_a_copy_in_a_folder_of_another_split(content, folder, role):
    copy = Image(f"{folder}/a/copy.png", "a", folder, True, 1, content)
    found = reconcile(TABLE, changed(more=[copy]))
    assert found.roles[copy.file] == role
    assert [(c.kind, c.file) for c in found.changes] == [("added" if content == "a9" else "crossed", copy.file)]


def test_a_held_out_image_that_was_moved_into_the_training_folder_stays_held_out():
    found = reconcile(TABLE, changed(drop="a5", more=[Image("train/a/a5.png", "a", "train", True, 1, "a5")]))
    assert found.roles["train/a/a5.png"] == "val"
    assert found.changes == [Change("moved", "train/a/a5.png", "it was a/a5.png")]


def test_new_content_that_comes_into_two_splits_at_once_is_used_in_one():
    twice = [Image(f"{split}/a/new.png", "a", split, True, 1, "a9") for split in ("train", "val")]
    found = reconcile(TABLE, changed(more=twice))
    assert [found.roles[image.file] for image in twice] == ["train", "unused"]
    assert [(c.kind, c.file) for c in found.changes] == [("added", "train/a/new.png"), ("crossed", "val/a/new.png")]


def test_an_image_that_comes_back_is_what_it_was():
    without = TABLE.with_rows(reconcile(TABLE, changed(drop="a5")).rows)
    back = reconcile(without, changed(drop="a5", more=[Image("a/new name.png", "a", "train", False, 1, "a5")]))
    assert back.roles["a/new name.png"] == "val"


def test_new_images_are_trained_on_and_not_where_their_number_is_bounded():
    new = changed(more=[Image("a/a9.png", "a", "val", False, 1, "a9")])
    assert reconcile(TABLE, new).roles["a/a9.png"] == "train"
    assert reconcile(TABLE, new, bounded=True).roles["a/a9.png"] == "unused"


def test_a_table_without_content_decides_by_path():
    old = type(TABLE)(tuple(row._replace(size=0, digest="") for row in TABLE.start))
    found = reconcile(old, changed(drop="a5", more=[Image("a/a0.png", "a", "train", False, 1, "a5")]))
    assert found.roles["a/a6.png"] == "val"
    assert found.roles["a/a0.png"] == "unused"  # it may be a5 under another name
    known = old.with_rows(reconcile(old, changed()).rows)
    found = reconcile(known, changed(drop="a5", more=[Image("a/a0.png", "a", "train", False, 1, "a5")]))
    assert found.roles["a/a0.png"] == "val"


def test_another_folder_keeps_its_own_draw_without_what_was_trained_on():
    other = [i._replace(digest=f"x{i.digest}") for i in images(train=TRAIN, val=VAL)]
    other[-1] = other[-1]._replace(digest="a1")
    assert is_another(TABLE, other)
    assert not is_another(TABLE, changed(drop="a1 a5"))
    found = reconcile(TABLE, other, another=True)
    assert [i.file for i in other if found.roles[i.file] == "val"] == ["a/a5.png", "a/a6.png", "b/b5.png"]
    assert found.roles[other[-1].file] == "train"


def test_a_file_that_cannot_be_read_is_neither_removed_nor_changed():
    assert reconcile(TABLE, changed(drop="a5"), unusable=["a/a5.png"]).changes == []
