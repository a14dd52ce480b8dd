"""A stored result is compared with a fresh one on a few rows before it is believed.

The key of a store holds what the rows are known to depend on; a few fresh rows show what nobody thought of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from finetune.store import Rows, Store

ROWS = 4
"""How many rows are computed anew, spread evenly over the store."""


def matches_fresh_rows(store: Store, compute: Callable[[list[int]], Sequence[Rows] | Rows], tolerance: float) -> bool:
    """Say whether a complete store holds what is computed now; discard it if it does not.

    Args:
        store: The store.
        compute: Called with row numbers; returns those rows, which may be shorter than the store's.
        tolerance: Largest norm of the difference of a row, relative to the norm of the larger one.
    """
    state = store.state()
    if state is None:
        return False
    numbers = sorted({round(place) for place in np.linspace(0, store.shape[0] - 1, ROWS)})
    fresh = compute(numbers)
    try:
        stored = store.rows()
    except (OSError, ValueError):  # another process has just found it wrong, and makes it anew
        return False
    alike = all(
        _alike(stored[number][: len(row)], np.asarray(row), tolerance) for number, row in zip(numbers, fresh, strict=True)
    )
    del stored  # an open file cannot be deleted everywhere
    if not alike:
        store.discard(state)
    return alike


def _alike(stored: Rows, fresh: Rows, tolerance: float) -> bool:
    a, b = stored.astype(np.float64), fresh.astype(np.float64)
    finite = np.isfinite(a)
    if stored.shape != fresh.shape or not np.array_equal(finite, np.isfinite(b)):
        return False
    a, b = a[finite], b[finite]
    return bool(np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(a), np.linalg.norm(b)))
