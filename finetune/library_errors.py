"""Exceptions of libraries that an ordinary mistake or a machine's limit leads to, as errors of ours that say what to do.

It is the last resort, for what no check at the door can know beforehand: a disk that fills up, a process that the system ends.
Nothing here imports torch.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator

from finetune.errors import CheckpointError, ConfigError, DataError, FinetuneError, TrainingError, did_you_mean
from finetune.escaping import shown

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}


def explained(error: BaseException) -> FinetuneError | None:
    """Return the error of ours that explains an exception of a library, or None if it is not a known one.

    Args:
        error: What was raised; what it was raised from is looked at as well.

    >>> print(explained(OSError(28, "No space left on device", "runs/a/metrics.csv")))
    runs/a/metrics.csv cannot be written: there is no disk space left. Free some, or choose a place on another disk.
    >>> explained(ValueError("something else")) is None
    True
    """
    for each in _chain(error):
        if isinstance(each, OSError) and (found := _of_the_disk(each.errno, each.filename)):
            return found
        for pattern, explain in _PATTERNS:
            if match := re.search(pattern, str(each), re.DOTALL):
                return explain(match)
        if isinstance(each, MemoryError):
            return TrainingError(f"The memory of this machine is used up. {_LESS_MEMORY}")
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def _of_the_disk(number: int | None, path: object = None) -> FinetuneError | None:
    where = shown(os.fsdecode(path)) if isinstance(path, str | bytes) else "A file"
    if number in _FULL:
        return CheckpointError(
            f"{where} cannot be written: there is no disk space left. Free some, or choose a place on another disk."
        )
    if number in _CLOSED:
        reason = os.strerror(number or 0)
        return CheckpointError(
            f"{where} cannot be opened or written: {reason}. Change its permissions, or work on a copy in a folder of yours."
        )
    return None


_LESS_MEMORY = "Let less be in it at once: a smaller --data.batch_size, fewer --data.workers, a smaller --data.image_size."


def _worker(match: re.Match[str]) -> FinetuneError:
    return DataError(
        f"A process that reads images ended: {match[0].strip('. ')}. Most often the system ended it for want of memory. "
        f"{_LESS_MEMORY} With --data.workers 0 (--workers 0 for other commands) images are read in this process, which shows "
        "any other reason; in a container, a larger shared memory (--shm-size) may be missing."
    )


def _one_value(match: re.Match[str]) -> FinetuneError:
    return TrainingError(
        "BatchNorm cannot be estimated from one value per channel: a training batch has a single image. Set --data.batch_size "
        "to 2 or more; in a data loader of your own leave out a last batch of one with DataLoader(..., drop_last=True); or "
        "keep the pretrained statistics with --model.bn frozen (and no --model.bottleneck)."
    )


def _metric(match: re.Match[str]) -> FinetuneError:
    who, name = match["who"], match["name"]
    known = re.findall(r"[`']([^`',]+)[`']", match["known"])
    return ConfigError(
        f"{who} watches the metric '{name}', which this run does not log.{did_you_mean(name, known)} It logs: "
        f"{', '.join(known)}. The metric that chooses the best checkpoint is --run.monitor; a callback of your own has its "
        "option 'monitor'."
    )


def _closed(path: str) -> FinetuneError:
    return _of_the_disk(errno.EACCES, path) or FinetuneError(path)


def _missing(match: re.Match[str]) -> FinetuneError:
    return ConfigError(
        f"{match[1]} needs a library that is not installed. Install it with: {match[2]}; or leave {match[1]} out."
    )


_PATTERNS: list[tuple[str, Callable[[re.Match[str]], FinetuneError]]] = [
    (r"DataLoader worker \(pid[^)]*\) [^\n]*", _worker),
    (r"Expected more than 1 value per channel when training", _one_value),
    (
        r"`(?P<who>\w+)\(monitor='(?P<name>[^']*)'\)` could not find the monitored key in the returned metrics: "
        r"\[(?P<known>.*?)\]",
        _metric,
    ),
    (
        r"(?P<who>Early stopping) conditioned on metric `(?P<name>[^`]*)` which is not available\..*?following: (?P<known>.*)",
        _metric,
    ),
    (r"`(\w+)` requires `[^`]*`[^\n]*Install it by running `([^`]+)`", _missing),
    (r"not creatable since parent directory not writable: '([^']*)'", lambda match: _closed(match[1])),
    (r"No space left on device|os error 28\b", lambda match: _of_the_disk(errno.ENOSPC) or FinetuneError(match[0])),
    (r"Read-only file system|os error 30\b", lambda match: _of_the_disk(errno.EROFS) or FinetuneError(match[0])),
    (
        r"DefaultCPUAllocator: can't allocate memory|CUDA out of memory|MPS backend out of memory",
        lambda match: TrainingError(
            f"The memory is used up ({match[0].removeprefix('DefaultCPUAllocator: ')}). {_LESS_MEMORY}"
        ),
    ),
]
