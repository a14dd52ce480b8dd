"""The backbones that come along with the package: for each a safetensors file, and beside it the card that tells its sha256."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.errors import WeightsError
from finetune.weight_files import sha256_of

FOLDER = Path(__file__).parent / "bundled"
"""`<backbone>.safetensors` and `<backbone>.json`, as `write_weights` makes them."""

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
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"The card '{path}', which comes along with the package, is damaged. Put it right with: {REINSTALL}"
        ) from error
    return card if isinstance(card, dict) else {}
