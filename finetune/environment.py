"""What a run was made with: the versions of its libraries, and the commit of the folder it was started in."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from finetune.version import __version__

_LIBRARIES = ("torch", "torchvision", "lightning", "timm", "torchmetrics", "numpy", "pillow")
_PATIENCE = 5.0  # seconds for git, which may have a large folder on a slow disk to look through


def library_versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of the libraries that decide on results."""
    found = {"python": platform.python_version(), "resnet-finetune": __version__}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # it came without metadata, as builds from source may
            continue
    return found


def git_state(folder: str | os.PathLike[str] = ".") -> dict[str, Any] | None:
    """Return the commit that a folder is at, and whether files that git knows differ from it; None outside of git.

    A repository may name programs in its own configuration, which git runs to compare files (`filter`). Where it does, as one
    may that was downloaded as an archive, nothing is compared, and `dirty` is None.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    settings = _git(folder, "config", "--list", "--show-scope", "--name-only") or ""
    own = [line.split()[1] for line in settings.splitlines() if line.startswith(("local", "worktree"))]
    runs = not own or any(name.lower().startswith(("filter.", "include")) for name in own)
    changes = None if runs else _git(folder, "status", "--porcelain", "--untracked-files=no", "--ignore-submodules=dirty")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


_ONLY_LOOK = {
    "GIT_OPTIONAL_LOCKS": "0",  # nothing is written, and no hook runs
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_ALLOW_PROTOCOL": "none",  # nothing is fetched
}
_NO_PROGRAMS = ("-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")


def _git(folder: str | os.PathLike[str], *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *_NO_PROGRAMS, *words],
            cwd=Path(folder),
            env={**os.environ, **_ONLY_LOOK},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=True,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()
