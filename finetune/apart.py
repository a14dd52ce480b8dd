"""Trainings in processes of their own, one after the other, for tables of several."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from finetune.trusted_code import trusted_here


def train_apart(words: Sequence[str]) -> int:
    """Run the command in another process, trusting what this one trusts, and return its exit code.

    A signal that asks to stop is left to the training, which writes a checkpoint first: a terminal sends Ctrl-C to both, and
    SIGTERM is passed on.

    Args:
        words: The verb and its options.
    """
    with subprocess.Popen(_command(words), env=_environment()) as process:

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
    command = _command([*words, "--print_config"])
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    return done.stderr.strip() or f"exit code {done.returncode}" if done.returncode else None


def _command(words: Sequence[str]) -> list[str]:
    trust = [word for package in trusted_here() for word in ("--trust", package)]
    checkout = Path(__file__).resolve().parent.parent
    installed = str(checkout) in (os.path.realpath(entry) for entry in sys.path)
    program = ["-m", "finetune"] if installed else [str(checkout / "cli.py")]  # which loads the package by its place
    return [sys.executable, *program, *trust, *words]


def _environment() -> dict[str, str]:
    """Return the environment of a process that imports nothing from the working folder by its place."""
    return {"PYTHONSAFEPATH": "1", **os.environ}
