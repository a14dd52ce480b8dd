"""The backbones that come along with the package: for each a safetensors file, and beside it the card that tells its sha256."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from finetune.errors import WeightsError
from finetune.schema import convert, read_json
from finetune.weight_files import sha256_of

FOLDER = Path(__file__).parent / "bundled"
"""`<backbone>.safetensors` and `<backbone>.json`, as `write_weights` makes them."""


class _Card(TypedDict, total=False):
    sha256: str
    licence: str


REINSTALL = "pip install --force-reinstall --no-deps resnet-finetune"


def bundled_names() -> list[str]:
    """Return the names of the backbones whose weights come along."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def bundled_file(name: str) -> Path:
    """Return the file of a bundled backbone, which is what its card says, to the bit.

    Raises:
        WeightsError: If the backbone is not bundled, or its file is missing or damaged.
    """
    if name not in bundled_names():
        others = ", ".join(bundled_names())
        raise WeightsError(
            f"No weights of '{name}' come along with the package: expected "
            + (
                f"one of {others}. Set --model.backbone to it, or --model.weights auto."
                if others
                else "none, as it brings none."
            )
        )
    expected, path = bundled_card(name).get("sha256"), FOLDER / f"{name}.safetensors"
    found = sha256_of(path) if path.is_file() else None
    if expected is None or found != expected:
        state = "is missing" if found is None else f"is damaged: its sha256 is {found}, expected {expected}"
        raise WeightsError(f"The file '{path}', which comes along with the package, {state}. Put it right with: {REINSTALL}")
    return path


def bundled_card(name: str) -> dict[str, Any]:
    """Return the card beside a bundled file.

    Raises:
        WeightsError: If it cannot be read.
    """
    path = FOLDER / f"{name}.json"
    what, advice = "the card of weights that come along with the package", f"Put it right with: {REINSTALL}"
    card: dict[str, Any] = read_json(path, dict[str, Any], what, advice=advice, error=WeightsError)
    convert(card, _Card, what, where=str(path), advice=advice, error=WeightsError)
    return card
