"""Trainings in processes of their own, one after the other, for tables of several."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from finetune.trusted_code import trusted_here


def train_apart(words: Sequence[str]) -> int:
    """Run the command in another process, trusting what this one trusts, and return its exit code.

    A signal that asks to stop is left to the training, which writes a checkpoint first: a terminal sends Ctrl-C to both, and
    SIGTERM is passed on.

    Args:
        words: The verb and its options.
    """
    with subprocess.Popen(_command(words)) as process:

        def leave_to_it(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGTERM:
                process.terminate()

        before = {number: signal.signal(number, leave_to_it) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def objection(words: Sequence[str]) -> str | None:
    """Return what the command says against its options, or None; nothing is trained."""
    done = subprocess.run(_command([*words, "--print_config"]), capture_output=True, text=True, check=False)
    return done.stderr.strip() or f"exit code {done.returncode}" if done.returncode else None


def _command(words: Sequence[str]) -> list[str]:
    trust = [word for package in trusted_here() for word in ("--trust", package)]
    return [sys.executable, "-m", "finetune", *trust, *words]
