"""Make a folder with every kind of damage, let `check` look at it, and print what it says of each; then train on it.

python benchmarks/damage.py
"""

from __future__ import annotations

import os
import struct
import sys
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tabulate import tabulate

from finetune.check import check
from finetune.escaping import shown
from finetune.main import main

_MISSED = "NOT FOUND"


class Case(NamedTuple):
    """Something that is wrong with a folder: what, where, and the kind that `check` should give it."""

    what: str
    file: str
    kind: str


def picture(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    """Return a picture unlike those of other seeds."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def healthy_folder(root: Path, number: int = 12, classes: tuple[str, ...] = ("cat", "dog", "owl")) -> None:
    """Make a folder that nothing is wrong with."""
    for split, most in (("train", number), ("val", 3)):
        for place, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(most):
                picture(1000 * (split == "val") + 100 * place + index).save(folder / f"{index}.png")


def damaged_folder(root: Path) -> list[Case]:
    """Make a folder with damage of all kinds that do not keep it from being read as classes and splits."""
    healthy_folder(root)
    return [*_files(root), *_oddities(root), *_equals(root), *_names(root), *_classes(root), *_links(root), *_others(root)]


# ------------------------------------------------------------------------------------------------------- single pictures


def _files(root: Path) -> Iterator[Case]:
    cat = root / "train" / "cat"
    (cat / "zero.jpg").touch()
    yield Case("a file of 0 bytes", "train/cat/zero.jpg", "empty-file")
    (cat / "page.jpg").write_bytes(b"<!DOCTYPE html><title>404</title>")
    yield Case("a web page called .jpg", "train/cat/page.jpg", "not-a-picture")
    (cat / "zeros.png").write_bytes(bytes(2000))
    yield Case("a file of zeros", "train/cat/zeros.png", "not-a-picture")
    for number, (ending, options) in enumerate(_ENDINGS.items()):
        path = cat / f"cut{ending}"
        image = picture(2000 + number, 64, 64)
        (image.quantize() if ending == ".gif" else image).save(path, **options)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        yield Case(f"{ending} cut off in the middle", f"train/cat/cut{ending}", "truncated")
    (cat / "head.jpg").write_bytes(b"\xff\xd8\xff\xe0\0\x10JFIF")
    yield Case("the first 10 bytes of a JPEG", "train/cat/head.jpg", "truncated")
    picture(2010).save(cat / "rot.png")
    data = bytearray((cat / "rot.png").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (cat / "rot.png").write_bytes(data)
    yield Case("a PNG with one byte changed", "train/cat/rot.png", "damaged")
    Image.fromarray(np.linspace(-5, 5, 1024, dtype=np.float32).reshape(32, 32)).save(cat / "heights.tif")
    yield Case("floating-point values out of range", "train/cat/heights.tif", "damaged")
    (cat / "bomb.png").write_bytes(_bomb(60_000))
    yield Case("a PNG of 60,000 x 60,000 pixels in 80 bytes", "train/cat/bomb.png", "too-many-pixels")


_ENDINGS: dict[str, dict[str, Any]] = {".jpg": {"quality": 95}, ".png": {}, ".gif": {}, ".webp": {}, ".bmp": {}, ".tif": {}}


def _bomb(side: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


def _oddities(root: Path) -> Iterator[Case]:
    dog = root / "train" / "dog"
    saved: list[tuple[str, str, str, Callable[[Path], None]]] = [
        ("a PNG called .jpg", "png.jpg", "wrong-ending", lambda p: picture(2101).save(p, "PNG")),
        (
            "an animated GIF",
            "film.gif",
            "several-frames",
            lambda p: picture(2102).save(p, save_all=True, append_images=[picture(2103)]),
        ),
        (
            "a TIFF of two pages",
            "pages.tif",
            "several-frames",
            lambda p: picture(2104).save(p, save_all=True, append_images=[picture(2105)]),
        ),
        ("a picture of 1 x 1", "dot.png", "tiny", lambda p: picture(2106, 1, 1).save(p)),
        ("20,000 pixels wide", "long.png", "huge", lambda p: picture(2107, 20_000, 40).save(p)),
        ("5 times as long as wide", "strip.png", "elongated", lambda p: picture(2108, 160, 32).save(p)),
        ("all black", "black.png", "one-colour", lambda p: Image.new("RGB", (32, 32)).save(p)),
        (
            "16 bits",
            "deep.png",
            "deep-colour",
            lambda p: Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 60).save(p),
        ),
        ("CMYK", "print.jpg", "cmyk", lambda p: picture(2109).convert("CMYK").save(p)),
        ("transparent", "glass.png", "transparent", lambda p: _glass().save(p)),
        ("a HEIC file", "phone.heic", "unread-format", lambda p: _write(p, b"\0\0\0\x18ftypheic")),
        ("a PNG without an ending", "noending", "unread-format", lambda p: picture(2110).save(p, "PNG")),
    ]
    for what, name, kind, save in saved:
        save(dog / name)
        yield Case(what, f"train/dog/{name}", kind)


def _glass() -> Image.Image:
    image = picture(2111).convert("RGBA")
    image.putalpha(128)
    return image


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _equals(root: Path) -> Iterator[Case]:
    train, val = root / "train", root / "val"
    (train / "cat" / "zcopy.png").write_bytes((train / "cat" / "0.png").read_bytes())
    yield Case("the same file again", "train/cat/zcopy.png", "duplicate")
    with Image.open(train / "owl" / "0.png") as image:
        image.save(train / "owl" / "zcopy.bmp")
    yield Case("the same pixels in another format", "train/owl/zcopy.bmp", "duplicate")
    (train / "dog" / "cat1.png").write_bytes((train / "cat" / "1.png").read_bytes())
    yield Case("the same picture under two labels", "train/dog/cat1.png", "two-labels")
    (val / "dog" / "leak.png").write_bytes((train / "dog" / "2.png").read_bytes())
    yield Case("a training picture in validation", "val/dog/leak.png", "in-two-splits")


# -------------------------------------------------------------------------------------------- names, classes, links, rest


def _names(root: Path) -> Iterator[Case]:
    owl = root / "train" / "owl"
    named = [
        ("a space", "an owl.png", "space-in-name"),
        ("spaces at the ends", " owl .png ", "other-file"),
        ("an emoji", "\U0001f989.png", "unusual-name"),
        ("a line end", "two\nlines.png", "control-characters"),
        ("codes that colour a terminal", "\x1b[31mred.png", "control-characters"),
        ("a letter that turns the direction of writing", "a\u202egnp.png", "control-characters"),
        ("a command for a shell", "$(touch hacked).png", "unusual-name"),
        ("a formula", "=HYPERLINK(1).png", "risky-name"),
        ("markup", "<img src=x onerror=alert(1)>.png", "risky-name"),
        ("bytes that are no letters", os.fsdecode(b"caf\xe9.png"), "undecodable-name"),
    ]
    for number, (what, name, kind) in enumerate(named):
        picture(3000 + number).save(owl / name, "PNG")
        yield Case(f"a name with {what}", f"train/owl/{name}", kind)
    for number, name in enumerate(("same.png", "SAME.png")):
        picture(3100 + number).save(owl / name)
    yield Case("names that differ in case", "train/owl/SAME.png", "case-clash")


def _classes(root: Path) -> Iterator[Case]:
    accents = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    for place, (split, name, number) in enumerate(
        [("train", "Cat", 12), ("train", accents[0], 12), ("val", accents[1], 2), ("train", "few", 1), ("val", "ghost", 2)]
    ):
        folder = root / split / name
        folder.mkdir(parents=True)
        for index in range(number):
            picture(4000 + 100 * place + index).save(folder / f"{index}.png")
    (root / "train" / "empty").mkdir()
    yield Case("classes that differ in case", "Cat", "similar-names")
    yield Case("classes that differ in Unicode form", accents[1], "similar-names")
    yield Case("a class with 1 picture", "few", "few-pictures")
    yield Case("a class much smaller than the others", "few", "imbalance")
    yield Case("a class that validation lacks", "few", "missing-class")
    yield Case("a class in validation only", "ghost", "unknown-class")
    yield Case("a class without pictures", "empty", "empty-class")
    (root / "train" / "owl" / "deeper").mkdir()
    picture(4900).save(root / "train" / "owl" / "deeper" / "x.png")
    yield Case("pictures in a class and below it", "train/owl", "mixed-nesting")
    for name in ("test_set", "backup"):
        (root / name / "cat").mkdir(parents=True)
        picture(4901).save(root / name / "cat" / "0.png")
    yield Case("a split under another name", "test_set", "split-name")
    yield Case("a folder beside the splits", "backup", "ignored-folder")


def _links(root: Path) -> Iterator[Case]:
    dog = root / "train" / "dog"
    (dog / "gone.jpg").symlink_to(root / "nowhere.jpg")
    yield Case("a link to nothing", "train/dog/gone.jpg", "broken-link")
    (dog / "self.jpg").symlink_to(dog / "self.jpg")
    yield Case("a link to itself", "train/dog/self.jpg", "broken-link")
    (dog / "up").symlink_to(root / "train")
    yield Case("a link to a folder above", "train/dog/up", "link-loop")
    (dog / "sub").mkdir()
    picture(5000).save(dog / "sub" / "0.png")
    (dog / "zsub").symlink_to(dog / "sub")
    yield Case("a second link to a folder", "train/dog/zsub", "linked-again")


def _others(root: Path) -> Iterator[Case]:
    cat = root / "train" / "cat"
    for what, file, kind in (
        ("what macOS leaves", "train/cat/.DS_Store", "hidden"),
        ("what archives of macOS leave", "train/__MACOSX", "hidden"),
        ("what Windows leaves", "train/cat/Thumbs.db", "hidden"),
        ("notes", "train/cat/notes.txt", "other-file"),
        ("an archive", "train/cat/more.zip", "archive"),
    ):
        (root / file).write_bytes(b"x")
        yield Case(what, file, kind)
    picture(6000).save(root / "train" / "loose.png")
    yield Case("a picture beside the classes", "train/loose.png", "outside-a-class")
    os.mkfifo(cat / "pipe.jpg")
    yield Case("a pipe, which reading would wait for", "train/cat/pipe.jpg", "special-file")


# ------------------------------------------------------------------------------------------- layouts that cannot be read


def broken_layouts(root: Path) -> list[Case]:
    """Make folders that cannot be read as classes and splits."""
    layouts = {
        "pictures without classes": ["1.png", "2.png"],
        "one class": ["cat/1.png", "cat/2.png"],
        "two folders for one split": ["train/a/1.png", "train/b/1.png", "val/a/1.png", "valid/a/1.png"],
        "validation without training": ["val/a/1.png", "test/a/1.png"],
        "a split without classes": ["train/1.png", "val/1.png"],
        "a split or a class": ["train/cat/1.png", "train/dog/1.png", "extra/1.png"],
    }
    for number, (what, files) in enumerate(layouts.items()):
        for place, file in enumerate(files):
            path = root / what / file
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(7000 + 100 * number + place).save(path)
    return [Case(what, what, "layout") for what in layouts]


def table(root: Path, cases: list[Case]) -> str:
    """Return what `check` says of each case."""
    found = check(root).findings
    rows = []
    for case in cases:
        kinds = [finding.kind for finding in found if finding.file == case.file]
        said = ", ".join(sorted(set(kinds), key=lambda kind: kind != case.kind))
        rows.append((case.what, shown(case.file), said or "NOTHING", "yes" if case.kind in kinds else _MISSED))
    return tabulate(rows, ["damage", "where", "what check says", "right"], disable_numparse=True)


def _main() -> None:
    with tempfile.TemporaryDirectory(prefix="damage-") as folder:
        os.environ["RESNET_FINETUNE_CACHE"] = f"{folder}/cache"
        root = Path(folder, "photos")
        cases = damaged_folder(root)
        found = table(root, cases)
        print(f"{found}\n{len(cases)} cases of {len({case.kind for case in cases})} kinds\n")
        for case in broken_layouts(Path(folder, "layouts")):
            (finding,) = [each for each in check(Path(folder, "layouts", case.file)).findings if each.kind == "layout"]
            print(f"{case.what}: {finding.kind}: {finding.detail.replace(folder, '')}")
        print()
        Path(folder, "run.yaml").write_text("seed_everything: 0\n")
        options = [
            "--config",
            f"{folder}/run.yaml",
            "--model.backbone",
            "test_resnet",
            "--model.weights",
            "none",
            "--data.image_size",
            "32",
        ]
        options += ["--data.root", str(root), "--run.folder", f"{folder}/runs", "--trainer.max_epochs", "1"]
        main(["fit", *options, "--data.on_error", "skip", "--data.max_errors", "0.5"])
        print("fit ended, exit code 0\n")
        try:
            main(["fit", *options])
        except SystemExit as end:
            print(f"fit with --data.on_error raise ended, exit code {end.code}", file=sys.stderr)
        raise SystemExit(int(_MISSED in found))


if __name__ == "__main__":
    _main()
