"""The format of what the toolkit adds to a checkpoint: older ones are brought up to date, newer ones refused.

Format 1 held class names, input and the origin of the weights. Format 2 also holds the facts of the run that an exact resume
depends on, and a callback of ours keeps last.ckpt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetune.errors import CheckpointError
from finetune.version import __version__

KEY = "finetune"
FORMAT = 2


def upgrade(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Bring a checkpoint of an older format up to date, in place; one that is not of this toolkit stays as it is.

    Args:
        checkpoint: The checkpoint.

    Raises:
        CheckpointError: If its format is newer than this version, or none that ever was.
    """
    stamped = checkpoint.get(KEY)
    if stamped is None:
        return checkpoint
    found = stamped.get("format") if isinstance(stamped, dict) else None
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise CheckpointError(f"The checkpoint says its format is {found!r}; expected one from 1 to {FORMAT}. It is damaged.")
    if found > FORMAT:
        raise CheckpointError(
            f"The checkpoint has format {found} (written by version {stamped.get('version')}), this is version "
            f"{__version__} and reads up to {FORMAT}. Update with: pip install -U resnet-finetune"
        )
    for number in range(found, FORMAT):
        _STEPS[number](checkpoint)
    stamped["format"] = FORMAT
    return checkpoint


def _from_1(checkpoint: dict[str, Any]) -> None:
    """The callback of Lightning that kept last.ckpt has nothing that the one in its place needs."""
    states = checkpoint.get("callbacks")
    states = states if isinstance(states, dict) else {}
    for key in [key for key in states if str(key).startswith("ModelCheckpoint{'monitor': None")]:
        del states[key]
    checkpoint[KEY].setdefault("run", {})


_STEPS: dict[int, Callable[[dict[str, Any]], None]] = {1: _from_1}
