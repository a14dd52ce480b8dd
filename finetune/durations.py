"""Durations in words: the one way in which the console, the report and comparisons print a length of time."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return a length of time in words.

    >>> duration(4.26), duration(59.97), duration(192), duration(3599.6), duration(7260)
    ('4.3 s', '1 min 0 s', '3 min 12 s', '1 h 0 min', '2 h 1 min')
    """
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
