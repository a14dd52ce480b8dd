"""What came out of domain adaptation: the checkpoint that was chosen without labels, and beside it the one an oracle takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tabulate import tabulate

from finetune.run_files import RunFiles
from finetune.target import ORACLE


def domain_table(runs: Mapping[str, Path]) -> str:
    """Return a table with a row per run.

    Args:
        runs: Their folders, by the names that rows go by.
    """
    rows = [[name, *_row(RunFiles(run))] for name, run in runs.items()]
    monitor = RunFiles(next(iter(runs.values()))).monitor[0]
    chosen = f"chosen by {monitor}"
    return tabulate(
        rows, ["method", "source val/acc", f"target, {chosen}", "epoch", "target, by oracle", "epoch"], disable_numparse=True
    )


def _row(files: RunFiles) -> list[str]:
    best, oracle, source = files.best_epoch, files.metrics.get(ORACLE), files.metrics.get("val/acc")
    if best is None:
        return ["", "", "", "", ""]

    def at_best(name: str) -> str:
        curve = files.metrics.get(name)
        values = np.array([]) if curve is None else curve.y[np.round(curve.x) == best + 1]
        return f"{values[-1]:.4f}" if len(values) else "not known"

    if oracle is None:
        return [at_best("val/acc") if source is not None else "", "not known", str(best + 1), "", ""]
    place = int(np.nanargmax(oracle.y))
    epoch = round(float(oracle.x[place]))
    return [at_best("val/acc"), at_best(ORACLE), str(best + 1), f"{oracle.y[place]:.4f}", str(epoch)]
