"""Jobs of SLURM: one folder for all tasks of a run, found again when the job is requeued.

Lightning answers the requeue signal: it keeps a checkpoint and hands the job back. The job then starts with the same words,
under the same number; so number and words name the folder.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from finetune.randomness import seed_of


def job_folder(home: Path, command: Sequence[str]) -> Path | None:
    """Return the folder of a run that is a job of SLURM, or None outside of one.

    Args:
        home: The folder that it lies in.
        command: The words that started it.
    """
    if not SLURMEnvironment.detect():
        return None
    job = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID", ""))
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    number = f"{job}_{task}" if task else job
    return home / f"slurm-{number}-{seed_of(*command[1:]) % 16**4:04x}" if number else None


def requeued_checkpoint(folder: Path | None) -> Path | None:
    """Return the checkpoint to go on from in a job that was requeued, the newest in its folders; None if there is none.

    A start that was stopped before its first checkpoint left a folder, and the next one got a folder with a number behind it.
    """
    if folder is None or int(os.environ.get("SLURM_RESTART_COUNT") or 0) == 0:
        return None
    homes = [folder, *folder.parent.glob(f"{folder.name}-*")]
    kept = [path for home in homes for path in (*home.glob("hpc_ckpt_*.ckpt"), *home.glob("checkpoints/last.ckpt"))]
    return max(kept, key=lambda path: path.stat().st_mtime, default=None)
